"""Commands whose numbers README.md and docs/ quote."""
