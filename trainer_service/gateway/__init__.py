"""HTTP before Gradwire trainers, for unmodified clients of hosted services: the tinker SDK and OpenAI's."""
