"""The gRPC border: decodes, delegates, encodes."""
