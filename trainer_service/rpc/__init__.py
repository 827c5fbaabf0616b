"""The gRPC border: decode, delegate, encode."""
