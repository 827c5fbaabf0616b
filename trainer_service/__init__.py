"""The Gradwire trainer: the front end (no torch), the worker (`engine`), and the control plane (`jobs`)."""
