"""The benchmark gives both sides the same work and reports what it did; how fast they are is not tested."""

import json

from longvid_jax.evaluate import bench_video
from longvid_jax.video import Video


def test_both_sides_give_out_the_same_frames(encode):
    result = bench_video.run(encode("v.mp4", count=400), repeats=1)
    assert result["loop"]["samples"] == result["stream"]["samples"] == 16
    assert "400 frames" in result["video"] and result["ratio"] > 0
    assert json.loads(json.dumps(result)) == result
    text = bench_video.report(result)
    assert "PyAV loop" in text and "Video.stream" in text and "goal: at least 0.80" in text


def test_the_video_that_is_made(tmp_path):
    probe = Video(bench_video.make_video(tmp_path, minutes=0.5)).probe
    assert (probe.width, probe.height, probe.fps, probe.num_frames, probe.codec) == (640, 360, 25.0, 750, "h264")
    assert probe.duration == 30.0
