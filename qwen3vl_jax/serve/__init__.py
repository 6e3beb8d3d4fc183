"""An HTTP server for OpenAI's clients, over the batch engine."""
