"""Whether a run fits the chips of a cloud and what it would cost, compiled without any of them."""
