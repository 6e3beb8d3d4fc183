"""Local and gs:// files: paths, JSON, directories written whole or not at all."""
