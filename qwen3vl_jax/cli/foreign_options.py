"""Options of transformers, vLLM, llama.cpp and ollama, for those who know these."""

# Ours, and names for the same with the same values, which are taken.
_SAME = {
    "--ckpt": "--model -m --model-path --model-name-or-path --hf-repo -hf",
    "--revision": "--hf-revision",
    "--dtype": "--torch-dtype",
    "--adapter": "--lora --lora-path --peft-model",
    "--chat-template": "--chat-template-file --jinja-template",
    "--prompt": "-p --question --query --text",
    "--system": "--system-prompt -sys",
    "--max-new-tokens": "--max-tokens --max-completion-tokens --num-predict --n-predict -n",
    "--min-new-tokens": "--min-tokens",
    "--max-len": "--max-model-len --max-length --ctx-size -c --num-ctx --context-length",
    "--temperature": "--temp",
    "--repetition-penalty": "--repeat-penalty",
    "--stop": "--stop-strings --stop-sequence --reverse-prompt -r",
    "--seed": "-s",
    "--answers": "--num-return-sequences --num-samples",
    "--input": "--input-file",
    "--output": "--output-file -o",
    "--rows": "--max-num-seqs --parallel -np",
    "--media-root": "--allowed-local-media-path",
    "--profile": "--profile-dir",
}
# What to type, or to know, in place of others.
_INSTEAD = {
    "--mesh tp=N": "--tp --tp-size -tp --tensor-parallel-size",
    "--mesh ep=N": "--ep --ep-size --enable-expert-parallel",
    "--mesh dp=N": "--dp --dp-size -dp --data-parallel-size",
    "--rows N": "--batch-size -b --batch",
    "--weights int8": "--load-in-8bit --quantization --quantize -q",
    "--weights int4": "--load-in-4bit",
    "--temperature 1": "--do-sample",
    "--temperature 0": "--greedy",
    "--fps X": "--video-fps",
    "--chat": "--interactive -i --conversation -cnv",
    "--messages FILE": "--file -f",
    "--adapter DIR|ID": "--lora-modules --enable-lora",
    "JAX takes the devices that it finds; JAX_PLATFORMS=cpu takes the CPU, --mesh several": """
        --device --device-map --n-gpu-layers --gpu-layers -ngl --main-gpu --threads -t""",
    "XLA_CLIENT_MEM_FRACTION=0.8 in the environment does this": "--gpu-memory-utilization",
    "it is in --ckpt, leave it out": "--tokenizer --mmproj",
    "no code of a checkpoint is ever run, leave it out": "--trust-remote-code",
    "the device decides, leave it out": """
        --attn-implementation --flash-attn -fa --enforce-eager --use-cache --no-mmap --verbose""",
    "there is no beam search, --answers samples several answers": "--num-beams",
    "qwen3vl serve answers over HTTP": "--host --port --api-key --served-model-name",
}
FOREIGN = {name: ours for ours, names in (_SAME | _INSTEAD).items() for name in names.split()}
