"""Tokens out: generation, the batch engine, chat sessions, scores and embeddings."""
