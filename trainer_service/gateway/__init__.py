"""HTTP for clients of hosted services: the tinker SDK, Fireworks' and OpenAI's, unmodified, before Gradwire trainers."""
