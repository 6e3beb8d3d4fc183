"""Small video files for the tests, written with PyAV."""

from fractions import Fraction

import av
import numpy as np


def waves(count, height, width, seed=0):
    """RGB frames [T H W 3] uint8 that all differ: a wave that wanders, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    frames = [
        [127 + 100 * np.sin(x / 9 + y / (5 + c) + 0.7 * t + seed) for c in range(3)]
        for t in range(count)
    ]
    noise = rng.integers(-20, 21, (count, height, width, 3))
    return np.clip(np.moveaxis(np.array(frames), 1, 3) + noise, 0, 255).astype(np.uint8)


def bars(count, height=48, width=64):
    """Frames whose brightness is their number: 8 t, so that a decoded frame tells which it is."""
    return np.broadcast_to(
        (8 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3)
    )


def write(
    path, frames, rate=10, codec="libx264", pixels="yuv420p", turn=None, times=None, **options
):
    """Encodes frames [T H W 3 or 4]; times (seconds) make the rate vary; returns the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.options = {k: str(v) for k, v in options.items()}
        if turn is not None:
            stream.set_display_rotation(turn)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            layout = "rgba" if frame.shape[2] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=layout)
            if times is not None:
                picture.pts, picture.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_sound(path):
    """A file with one second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
