"""Commands whose numbers the README quotes."""
