"""The bundled demo: a very small Qwen3-VL that reads handwritten digits, and how it was made."""
