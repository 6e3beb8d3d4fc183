"""Options of transformers, vLLM, llama.cpp and ollama, for those who know these."""

# Ours: names for the same with the same values, which are taken; or what to type, or to know, in place of
# others.
_NAMES = """
--ckpt: --model -m --model-path --model-name-or-path --hf-repo -hf; --revision: --hf-revision
--dtype: --torch-dtype; --adapter: --lora --lora-path --peft-model; --chat-template: --chat-template-file
--prompt: -p --question --query --text; --system: --system-prompt -sys
--max-new-tokens: --max-tokens --max-completion-tokens --num-predict --n-predict -n
--min-new-tokens: --min-tokens; --max-len: --max-model-len --max-length --ctx-size -c --num-ctx
--temperature: --temp; --repetition-penalty: --repeat-penalty; --seed: -s
--stop: --stop-strings --stop-sequence --reverse-prompt -r; --answers: --num-return-sequences --num-samples
--input: --input-file; --output: --output-file -o; --rows: --max-num-seqs --parallel -np
--media-root: --allowed-local-media-path; --chat: --interactive -i --conversation -cnv
--mesh tp=N: --tp --tp-size -tp --tensor-parallel-size; --mesh dp=N: --dp --dp-size --data-parallel-size
--mesh ep=N: --ep --ep-size --enable-expert-parallel; --rows N: --batch-size -b
--weights int8: --load-in-8bit --quantization --quantize -q; --weights int4: --load-in-4bit
--temperature 1: --do-sample; --messages FILE: --file -f; --adapter DIR: --lora-modules --enable-lora
JAX takes what it finds, --mesh several, JAX_PLATFORMS=cpu none: --device --device-map --gpu-layers -ngl
XLA_CLIENT_MEM_FRACTION=0.8 in the environment does this: --gpu-memory-utilization
it is in --ckpt, leave it out: --tokenizer --mmproj; no code of a checkpoint is run: --trust-remote-code
the device decides, leave it out: --attn-implementation --flash-attn -fa --enforce-eager --use-cache
there is no beam search, --answers samples several: --num-beams
qwen3vl serve answers over HTTP: --host --port --api-key --served-model-name
"""
_PAIRS = [entry.rsplit(": ", 1) for entry in _NAMES.strip().replace("; ", "\n").splitlines()]
FOREIGN = {name: ours for ours, names in _PAIRS for name in names.split()}
