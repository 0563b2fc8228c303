"""A video file, a folder of images or an array becomes masked windows of frames with their times."""

from longvid_jax.video.frames import Frames, Probe, Report
from longvid_jax.video.video import Video, stream_batch

__all__ = ["Frames", "Probe", "Report", "Video", "stream_batch"]
