"""Files of weights <-> the parameter tree: Orbax, Hugging Face, PEFT, FP8 and int8."""
