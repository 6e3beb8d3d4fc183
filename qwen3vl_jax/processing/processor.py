"""Conversations, or raw text, images and videos -> encoded prompts; token ids back to text."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3vl_jax.config import Config, model_folder
from qwen3vl_jax.errors import InputError, shown, unexpected
from qwen3vl_jax.processing import encoding, messages
from qwen3vl_jax.processing.chat_template import ChatTemplate, Escape
from qwen3vl_jax.processing.encoded_prompt import Arrays, EncodedPrompt, to_hf_arrays
from qwen3vl_jax.processing.encoding import RenderedPrompt
from qwen3vl_jax.processing.fetching import FETCH_SECONDS, MAX_FETCH_BYTES, MediaRules
from qwen3vl_jax.processing.parse_reply import Reply, parse_reply
from qwen3vl_jax.processing.settings import MODEL_SIZES, ImageSettings, VideoSettings
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.storage.json_text import read_json_file, write_json

if TYPE_CHECKING:
    from qwen3vl_jax.model.structs import Batch

# Defaults of transformers 4.57.1 for a generation_config.json that samples and leaves these out.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_ALWAYS = ("repetition_penalty", "min_new_tokens")
# Other ways to decode, with the value that means "off".
_OTHER = dict.fromkeys(("num_beams", "num_beam_groups", "typical_p"), 1)
_OTHER |= dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"), 0)
_OTHER |= dict.fromkeys(("penalty_alpha", "guidance_scale", "bad_words_ids", "forced_eos_token_id"))
log = logging.getLogger("qwen3vl_jax")
Options = Mapping[str, Any] | None
Tools = Sequence[Mapping[str, Any]] | None


@dataclasses.dataclass
class Processor:
    """A checkpoint's tokenizer, chat template, and settings of images and videos."""

    config: Config
    tokenizer: Tokenizer
    template: ChatTemplate
    image_settings: ImageSettings
    video_settings: VideoSettings
    stop_ids: tuple[int, ...]  # ids that end an answer
    sampling: dict[str, float]  # arguments of Sampling that the checkpoint asks for
    wrap_clips: bool = False  # one more vision_start .. vision_end around all frames of a video
    max_fetch_bytes: int = MAX_FETCH_BYTES  # of an image or video given by URL
    fetch_seconds: float = FETCH_SECONDS
    media_rules: MediaRules = dataclasses.field(default_factory=MediaRules)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        chat_template: str | Path | None = None,
        revision: str | None = None,
    ) -> "Processor":
        """Reads a checkpoint directory, Hugging Face's or ours, or a Hub id as `load` does.

        That is config.json, tokenizer, chat template, generation_config.json, and image and video
        settings (released ones where there is no file). chat_template: a file, a template's text, or the
        name of one of the checkpoint's. revision: branch, tag or commit of a Hub id. Raises InputError.
        """
        directory = model_folder(resolve(source, revision))
        config = Config.from_hf(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        for name in ("image", "video", "vision_start", "vision_end"):
            if (token := getattr(config, f"{name}_token_id")) not in tokenizer.added.values():
                found = f"config.json's {name}_token_id {token}"
                raise InputError(f"{directory}: {found} is no added token of the tokenizer")
        vision = config.vision
        sizes = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        in_config: dict[str, Any] = dict(zip(MODEL_SIZES, sizes, strict=True))
        images = ImageSettings.from_dir(directory, ImageSettings(**in_config))
        videos = VideoSettings.from_dir(directory, VideoSettings(**in_config))
        for settings in (images, videos):
            for name, theirs in in_config.items():
                if (ours := getattr(settings, name)) != theirs:
                    found = f"{settings.KIND} {name} is {ours}"
                    raise InputError(f"{directory}: {found}, and {theirs} in config.json")
        template = ChatTemplate.from_dir(directory, chat_template)
        raw = read_generation_config(directory)
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        stops = stop_ids(raw) or config.eos_token_ids or eos
        sampling = sampling_defaults(raw)
        return cls(config, tokenizer, template, images, videos, stops, sampling)

    def render(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Tools = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_vars: Any,
    ) -> str:
        """The prompt of one conversation, one placeholder an image or video. Raises InputError.

        continue_final_message leaves the last message open and adds no new turn. A special token in a
        user's text looks like one here, which is why `__call__` does not encode this string.
        """
        ending = add_generation_prompt, continue_final_message
        return self._prompt(conversation, tools, True, template_vars, ending).text

    def encode(
        self,
        conversations: Any = None,
        *,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        videos_kwargs: Options = None,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        allow_special: bool | str = False,
        template_vars: Options = None,
        continuations: str | Sequence[str] | None = None,
        **image_overrides: Any,
    ) -> list[EncodedPrompt]:
        """One encoded prompt a conversation, or a text.

        conversations: one (a list of messages) or many; or text: raw prompts with placeholders and
        special tokens. images: one, a list, or a list a row, for raw text and for content items
        without a source; videos: one or a list. allow_special: texts may hold special tokens, or with
        "assistant" those of answers alone (training). image_overrides: image settings of this call
        (min_pixels=...); videos_kwargs: those of videos (fps=..., video_metadata one a video); a
        content item may have its own. continuations: one text a row after its prompt, for `score`.
        Raises InputError.
        """
        if (conversations is None) == (text is None):
            raise InputError("processor: expected conversations or text=, one of the two")
        if allow_special not in (True, False, "assistant"):
            raise unexpected("allow_special", repr(allow_special), "a bool or assistant")
        encoder = self._encoder(image_overrides)
        if text is not None:
            rendered = self._raw_prompts(text)
        else:
            ending = add_generation_prompt, continue_final_message
            given = tools, allow_special, template_vars or {}, ending
            rows = conversations if _is_many(conversations) else [conversations]
            rendered = [self._prompt(row, *given) for row in rows]
        if not rendered:
            raise InputError("processor: found no conversation and no text")
        rows = [prompt.sources for prompt in rendered]
        encoded = encoder.encode_all(encoding.complete(rows, images, videos, videos_kwargs or {}))
        given = self.tokenizer, self.config, self.wrap_clips
        prompts = [
            encoding.encode_prompt(*given, prompt, media, f"row {number}")
            for number, (prompt, media) in enumerate(zip(rendered, encoded), 1)
        ]
        if continuations is None:
            return prompts
        return encoding.add_continuations(self.tokenizer, prompts, continuations)

    def inputs(
        self, conversations: Any = None, *, padding_side: str = "right", **options: Any
    ) -> Arrays:
        """The numpy arrays that transformers' processor would return; options as in `encode`.

        Returns input_ids, attention_mask, mm_token_type_ids (1 at images, 2 at videos) [B, T] int64, labels
        of continuations; of images pixel_values [sum patches, C*Tp*P*P] float32 and image_grid_thw [n, 3]
        int64; of videos pixel_values_videos, video_grid_thw and video_metadata, a list of UsedFrames.
        Raises InputError.
        """
        if padding_side not in ("right", "left"):
            raise unexpected("padding_side", repr(padding_side), "right or left")
        prompts = self.encode(conversations, **options)
        return to_hf_arrays(self.config, prompts, self.tokenizer.pad_id or 0, padding_side)

    def __call__(self, conversations: Any = None, **options: Any) -> "Batch":
        """A Batch of conversations or of text=; options as in `encode`. Raises InputError."""
        # A Batch holds jax arrays; all else here is numpy, for workers and checks without jax.
        from qwen3vl_jax.processing.batch import make_batch

        return make_batch(self.config, **self.inputs(conversations, **options))

    def look(
        self, item: Mapping[str, Any], *, videos_kwargs: Options = None, **image_overrides: Any
    ) -> dict[str, Any]:
        """A content item whose image or video is read now, once for all later calls. Raises InputError."""
        encoder = self._encoder(image_overrides)
        _, sources = messages.read_conversation([{"role": "user", "content": [item]}])
        ((source,),) = encoding.complete([sources], None, None, videos_kwargs or {})
        return {"type": source.kind, source.kind: encoder(source).with_digest()}

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Text of token ids: a string for one row, a list of strings for several."""
        if hasattr(tokens, "__array__"):
            tokens = np.asarray(tokens).tolist()
        tokens = [tokens] if isinstance(tokens, int) else tokens
        if isinstance(tokens, str) or not isinstance(tokens, Iterable):
            raise unexpected("decode", shown(tokens), "token ids")
        tokens = list(tokens)
        if tokens and not isinstance(tokens[0], int) and getattr(tokens[0], "ndim", 1):
            return [self.decode(row, skip_special_tokens) for row in tokens]
        return self.tokenizer.decode(tokens, skip_special_tokens)

    def parse(self, answer: Any, prompt: str = "") -> Reply:
        """The parts of an answer (text, or its token ids): reasoning, content and tool calls.

        A call that cannot be read stays in the content, with a warning. prompt: one that ends with <think>
        makes the text after it reasoning.
        """
        text = answer if isinstance(answer, str) else self.decode(answer)
        reply = parse_reply(text, thinking=prompt.rstrip().endswith("<think>"))
        for line in reply.unparsed:
            log.warning("%s", line)
        return reply

    def _prompt(self, conversation, tools, allow_special, template_vars, ending) -> RenderedPrompt:
        plain, sources = messages.read_conversation(conversation)
        text = self.template.text(bool(tools))
        messages.check_messages(plain, text)
        listed, variables = messages.plain_options(tools, template_vars)
        names = {"eos_token": self.tokenizer.eos_id, "pad_token": self.tokenizer.pad_id}
        given = {k: self.tokenizer.token_of(i) for k, i in names.items() if i is not None}
        self.template.check_written(plain, listed, given)
        escape = None
        if allow_special is not True:
            data = write_json([plain, listed, variables], "conversation", ensure_ascii=False)
            added = self.tokenizer.added.keys() - self.tokenizer.special.keys()
            escape = Escape(self.tokenizer.special, added, data + text)
            trusted = "assistant" if allow_special else None
            plain = [m if m["role"] == trusted else escape.message(m) for m in plain]
            listed = escape.data(listed)
            # Templates are given tokens by such names (bos_token); those are not a user's text.
            texts = {k: escape.data(v) for k, v in variables.items() if not k.endswith("_token")}
            variables |= texts
        add, is_open = ending
        rendered = self.template.render(plain, listed, add, is_open, {**given, **variables})
        if escape is None:
            return RenderedPrompt(rendered, "", sources)
        return RenderedPrompt(escape.tidy(rendered), escape.mark, sources)

    def _raw_prompts(self, text: str | Sequence[str]) -> list[RenderedPrompt]:
        rows = [text] if isinstance(text, str) else list(text)
        kinds = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        names = {self.tokenizer.token_of(i): kind for kind, i in kinds.items()}
        place, prompts = re.compile("|".join(map(re.escape, names))), []
        for row in rows:
            if not isinstance(row, str):
                raise unexpected("text", type(row).__name__, "a string or strings")
            sources = [messages.MediaSource(names[token], None) for token in place.findall(row)]
            prompts.append(RenderedPrompt(row, "", sources))
        return prompts

    def _encoder(self, overrides: Mapping[str, Any]) -> encoding.MediaEncoder:
        for name in MODEL_SIZES:
            if overrides.get(name) not in (None, getattr(self.image_settings, name)):
                raise InputError(f"image setting {name}: it is the model's; leave it out")
        limits = {"max_bytes": self.max_fetch_bytes, "seconds": self.fetch_seconds}
        rules = dataclasses.replace(self.media_rules, **limits)
        images = self.image_settings.override(**overrides)
        return encoding.MediaEncoder(images, self.video_settings, rules)


def _is_many(conversations: Any) -> bool:
    if isinstance(conversations, (str, Mapping)) or not isinstance(conversations, Sequence):
        expected = "a list of messages or of conversations (raw text goes in text=)"
        raise unexpected("conversations", type(conversations).__name__, expected)
    return bool(conversations) and not isinstance(conversations[0], Mapping)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json as a dict, empty where there is none. Raises InputError."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json_file(path)
    if not all(type(i) is int and 0 <= i < 2**31 for i in stop_ids(found)):
        raise unexpected(f"{path}: eos_token_id", shown(found["eos_token_id"]), "token ids")
    for name in (*_SAMPLED, "min_p", *_ALWAYS):
        value = found.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise unexpected(f"{path}: {name}", shown(value), "a number")
    for name, off in _OTHER.items():
        if found.get(name, off) not in (off, None):
            log.warning("%s: %s %r is not implemented and ignored", path, name, found[name])
    return found


def sampling_defaults(raw: Mapping[str, Any]) -> dict[str, float]:
    """Arguments of `Sampling` from a generation_config; without do_sample an answer is greedy."""
    given = {name: raw[name] for name in _ALWAYS if raw.get(name) is not None}
    if raw.get("do_sample"):
        names = (*_SAMPLED, "min_p")
        given |= _SAMPLED | {name: raw[name] for name in names if raw.get(name) is not None}
    return given


def stop_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer, empty where the file names none."""
    eos = raw.get("eos_token_id")
    return tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
