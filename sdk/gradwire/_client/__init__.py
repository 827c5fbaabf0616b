"""How the clients work inside; nothing here is for users to import."""
