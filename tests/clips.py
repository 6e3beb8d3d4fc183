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


def bars(count, height=48, width=64, step=8):
    """Frames whose brightness is their number: step t, so that a decoded frame tells which it is."""
    values = (step * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3))


def write(
    path, frames, rate=10, codec="libx264", pixels="yuv420p", times=None, movflags=None, **options
):
    """Encodes frames [T H W 3 or 4]; times (seconds) make the rate vary; returns the path.

    options are the codec's.
    """
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.options = {k: str(v) for k, v in options.items()}
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


def write_colour(path, colour, codec, matrix, full):
    """A clip of one colour whose file says its matrix (None: nothing) and range."""
    rgb = np.broadcast_to(np.uint8(colour), (3, 32, 32, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = (
            32,
            32,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        context = stream.codec_context
        context.color_range = 2 if full else 1
        if matrix:
            context.colorspace = context.color_primaries = context.color_trc = matrix
        for frame in rgb:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format=stream.pix_fmt, dst_colorspace=matrix or 5, dst_color_range=2 if full else 1
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def copy(source, path, skip=0.0):
    """The same packets in another file, whose first `skip` seconds are not to be shown."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                shift = round(skip / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                new.mux(packet)
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
