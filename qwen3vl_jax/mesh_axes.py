"""The names of a mesh's axes. No jax."""

AXES = ("data", "fsdp", "expert", "sequence", "tensor")  # from the slowest links to the fastest
SHORT = {"dp": "data", "ep": "expert", "sp": "sequence", "tp": "tensor"}
