"""A bundle behind an HTTP endpoint that speaks as OpenAI's chat API does: an application, and a server for it."""
