"""Local and gs:// files: paths, JSON, safetensors, atomic directories, logs."""
