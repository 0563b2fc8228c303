"""The command line from end to end, on a tiny random checkpoint: answers, accounts, and one sentence for bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import longvid_jax as lv
from longvid_jax import cli
from longvid_jax.evaluate import ask, tiny
from longvid_jax.systems.retake import RetakeModel

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = shutil.which("longvid", path=Path(sys.executable).parent)
COMMAND = [INSTALLED] if INSTALLED else [sys.executable, "-m", "longvid_jax.cli"]
SIZES = {"width": 64, "depth": 2, "vision_width": 32, "vision_depth": 1}
FAST = ["--chunk-frames", "8", "--max-new-tokens", "4"]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """No compiled program of a test goes to the user's cache folder."""
    monkeypatch.setenv("LONGVID_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def movie(tmp_path_factory) -> Path:
    """12 s at 5 frames a second in Matroska, with cuts at 4 and 8 s."""
    path = tmp_path_factory.mktemp("video") / "movie.mkv"
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 256, (3, 4, 4, 3)).repeat(28, axis=1).repeat(28, axis=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 112, 112, "yuv420p", 10
        for i in range(60):
            pixels = np.roll(scenes[i // 20], i, axis=1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint after an edit of its tensors or of its config."""

    def damage(tensors=None, config=None, without=()):
        folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged", dirs_exist_ok=True))
        if tensors is not None:
            loaded = load_file(folder / "model.safetensors")
            tensors(loaded)
            save_file(loaded, folder / "model.safetensors")
        if config is not None:
            content = json.loads((folder / "config.json").read_text())
            config(content)
            (folder / "config.json").write_text(json.dumps(content))
        for name in without:
            (folder / name).unlink()
        return folder

    return damage


# --- what it gives ----------------------------------------------------------------------------------------------------


def test_answers_on_standard_output_and_the_account_on_standard_error(succeeds, checkpoint, movie):
    out, err = succeeds("ask", movie, "What is it?", "--model", checkpoint, *FAST)
    model = lv.load(checkpoint, method=lv.ReTaKe(keep_ratio=0.25, chunk_frames=8))
    answer = model.ask(lv.Video(movie), "What is it?", max_new_tokens=4)
    assert out == answer.text + "\n"
    assert "24/24" in err and "24 frames became 192 tokens, 48 of which were kept" in err


def test_several_questions_after_one_watching(succeeds, checkpoint, movie, monkeypatch):
    streams = []
    stream = RetakeModel.stream
    monkeypatch.setattr(RetakeModel, "stream", lambda self, video: streams.append(video) or stream(self, video))
    questions = ["What is it?", "And what comes then?", "Why?"]
    out, _ = succeeds("ask", movie, *questions, "--model", checkpoint, "--json", *FAST)
    assert len(streams) == 1
    result = json.loads(out)
    assert [answer["question"] for answer in result["answers"]] == questions
    for answer in result["answers"]:
        alone, _ = succeeds("ask", movie, answer["question"], "--model", checkpoint, "--json", *FAST)
        assert json.loads(alone)["answers"] == [answer]
    out, _ = succeeds("ask", movie, *questions, "--model", checkpoint, *FAST)
    assert out.splitlines() == [line for a in result["answers"] for line in (f"> {a['question']}", a["text"])]


def test_json_is_true(succeeds, checkpoint, movie):
    out, _ = succeeds("ask", movie, "What is it?", "--model", checkpoint, "--json", "--dpselect", "frame", *FAST)
    result = json.loads(out)
    model = lv.load(checkpoint, method=lv.ReTaKe(keep_ratio=0.25, chunk_frames=8, dpselect="frame"))
    answer = model.ask(lv.Video(movie), "What is it?", max_new_tokens=4)
    assert result["answers"][0]["text"] == answer.text
    assert result["answers"][0]["tokens"] == answer.tokens[0].tolist()
    assert result["method"]["name"] == "retake" and result["method"]["keep_ratio"] == 0.25
    assert set(result["seconds"]) == {"load", "begin", "watch", "answer"}
    video, trace = result["video"], result["trace"]
    assert (video["path"], video["planned"], video["frames"], video["damaged"]) == (str(movie), 24, 24, False)
    assert video["frame_size"] == [112, 112] and video["duration"] == pytest.approx(12)
    # 24 frames are 12 temporal patches of 4 x 4 tokens, in 3 chunks of which int(0.25 * 64) stay in both layers.
    assert (trace["frames"], trace["tokens"], trace["tokens_kept"], trace["grid"]) == (24, 192, 48, [4, 4])
    assert trace["kept_count"] == [[16, 16, 16]] * 2
    a_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head width, bytes
    assert trace["cache_bytes"] == trace["cache_length"] * a_token
    assert trace["cache_bytes_uncompressed"] == (trace["cache_length"] - 48 + 192) * a_token
    assert trace["times"] == list(range(12)) == [patch["time"] for patch in trace["patches"]]
    assert all(patch["share"] in (0, 1) for patch in trace["patches"])
    assert trace["keyframes"] == [patch for patch in trace["patches"] if patch["share"] == 1]
    strongest = sorted(trace["patches"], key=lambda patch: -patch["change"])[:3]
    assert {patch["time"] for patch in strongest} == {0, 4, 8}
    assert {0, 4, 8} <= {patch["time"] for patch in trace["keyframes"]}


def test_without_a_method_everything_is_kept(succeeds, checkpoint, movie):
    out, _ = succeeds(
        "ask", movie, "What?", "--model", checkpoint, "--json", "--method", "none", "--max-new-tokens", "4"
    )
    result = json.loads(out)
    assert result["method"] == {"name": "none"}
    assert result["trace"]["tokens_kept"] == result["trace"]["tokens"] == 192
    assert result["trace"]["cache_bytes"] == result["trace"]["cache_bytes_uncompressed"]
    assert result["trace"]["patches"] is None and result["trace"]["keyframes"] is None


def test_options_reach_what_they_are_for(monkeypatch, fails, checkpoint, movie):
    seen = {}

    def stop(model, video, questions, **decoding):
        seen.update(model=model, video=video, decoding=decoding)
        raise lv.OptionError("Enough seen.")

    monkeypatch.setattr(ask, "ask", stop)
    options = (
        "--budget 99 --chunk-frames 4 --dpselect none --pivots always --no-reforge --yarn-factor 2 --prompt-guided "
        "--fps 3 --max-frames 7 --sampler linspace --long-side 84 --max-new-tokens 5 --temperature 0.5 --top-p 0.9 "
        "--seed 3 --dtype bfloat16 --check"
    )
    fails("ask", movie, "What?", "--model", checkpoint, *options.split())
    assert seen["model"].method == lv.ReTaKe(
        budget=99, chunk_frames=4, dpselect=None, pivots="always", reforge=False, yarn_factor=2.0, prompt_guided=True
    )
    video = seen["video"]
    assert (video.fps, video.max_frames, video.sampler, video.long_side) == (3, 7, "linspace", 84)
    assert seen["model"].frame_size(video) == (84, 84)
    assert seen["model"].model.text.norm.scale[...].dtype == "bfloat16"
    decoding = {name: value for name, value in seen["decoding"].items() if name != "progress"}
    assert decoding == {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3}


def test_plot(succeeds, checkpoint, movie, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # it is an extra
    figure = tmp_path / "timeline.png"
    out, _ = succeeds("ask", movie, "What is it?", "--model", checkpoint, "--plot", figure, *FAST)
    assert out.count("\n") == 1
    with Image.open(figure) as image:
        assert image.width == 1800 and 600 < image.height < 1200
        assert np.asarray(image.convert("L")).std() > 10
    assert list(tmp_path.iterdir()) == [figure]


def test_inspect(succeeds, checkpoint):
    out, _ = succeeds("inspect", checkpoint, "--json")
    tensors = load_file(checkpoint / "model.safetensors")
    assert {t["key"]: t["shape"] for t in json.loads(out)["tensors"]} == {k: list(v.shape) for k, v in tensors.items()}
    out, _ = succeeds("inspect", checkpoint)
    assert f"{sum(tensor.size for tensor in tensors.values()):,} parameters" in out and "lm_head" in out


def test_bench_video(succeeds, movie):
    out, _ = succeeds("bench", "video", movie, "--repeats", 1, "--json")
    assert json.loads(out)["video"].startswith("112x112 h264, 12 s")
    out, _ = succeeds("bench", "video", movie, "--repeats", 1)
    assert "PyAV loop" in out and "Video.stream" in out


def test_needle_of_a_real_film(clips, succeeds, checkpoint):
    """The cuts to and from the one cartoon shot in ten minutes, at 372 and 380 s, are marked and among the greatest."""
    film = clips / "haystack_10min.mp4"
    options = ["--fps", "1", "--dpselect", "frame", "--max-new-tokens", "2"]
    out, _ = succeeds("ask", film, "When is the bird shown?", "--model", checkpoint, "--json", *options)
    trace = json.loads(out)["trace"]
    needle = next(s for s in json.loads((clips / "haystack_10min.json").read_text())["segments"] if s["needle"])
    assert (needle["start"], needle["end"]) == (372, 380)
    assert {372, 380} <= {patch["time"] for patch in trace["keyframes"]}
    strongest = sorted(trace["patches"], key=lambda patch: -patch["change"])[:10]
    assert {372, 380} <= {patch["time"] for patch in strongest}


# --- damaged videos are answered from what decodes --------------------------------------------------------------------


def test_truncated_video(succeeds, checkpoint, movie, tmp_path):
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(movie.read_bytes()[: movie.stat().st_size * 2 // 3])
    out, err = succeeds("ask", cut, "What is it?", "--model", checkpoint, "--json", *FAST)
    (warning,) = [line for line in err.splitlines() if line.startswith("longvid: warning: ")]
    result = json.loads(out)
    assert f"{cut}: {result['video']['report']}." in warning
    # Of the 60, those that break off in the middle of a group of B-frames are in neither header nor file.
    assert 60 - 3 <= int(re.search(r"of (\d+) frames", warning)[1]) <= 60
    assert 0 < result["video"]["frames"] == result["trace"]["frames"] < 24
    assert result["video"]["damaged"] and result["answers"][0]["text"]


@pytest.mark.parametrize(
    ("name", "counts"), [("corrupted.mp4", "decoded 28 of 50"), ("truncated_body.mp4", "decoded 37 of 377")]
)
def test_real_damaged_video(clips, succeeds, checkpoint, name, counts):
    out, err = succeeds("ask", clips / "edge" / name, "What?", "--model", checkpoint, "--long-side", 112, *FAST)
    (warning,) = [line for line in err.splitlines() if line.startswith("longvid: warning: ")]
    assert f"{name}: {counts} frames" in warning
    assert out.strip()


# --- bad input: one sentence, exit code 2 -----------------------------------------------------------------------------


def test_not_videos(fails, checkpoint, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (tmp_path / "empty.mp4").touch()
    Image.new("RGB", (64, 48)).save(tmp_path / "still.png")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name, text in {
        "missing.mp4": "no such file",
        "noise.mp4": "not a video that FFmpeg can read",
        "empty.mp4": "the file is empty",
        "still.png": "an image, expected a video",
        "sound.mp4": "no video stream",
    }.items():
        line = fails("ask", tmp_path / name, "What?", "--model", checkpoint)
        assert name in line and text in line and line.endswith(".")


@pytest.mark.parametrize("name", ["not_a_video.mp4", "empty.mp4"])
def test_real_files_that_are_no_videos(clips, fails, checkpoint, name):
    assert name in fails("ask", clips / "edge" / name, "What?", "--model", checkpoint)


def test_tensors_that_do_not_fit(fails, damaged, movie):
    def misshapen(tensors):
        tensors["model.norm.weight"] = np.ones(63, np.float32)

    for edit, texts in {
        (lambda t: t.pop("model.norm.weight")): ["model.norm.weight: missing", "1 fault"],
        (lambda t: t.update(surplus=np.ones(3, np.float32))): ["surplus: no parameter has this name", "1 fault"],
        misshapen: ["model.norm.weight: has the shape [63], the config needs [64]", "1 fault"],
        (lambda t: [t.pop(key) for key in list(t) if "mlp" in key]): ["14 fault(s)", " | and 9 more"],
    }.items():
        line = fails("ask", movie, "What?", "--model", damaged(tensors=edit))
        assert all(text in line for text in texts), line


def test_check_finds_nan(fails, succeeds, damaged, movie):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan

    folder = damaged(tensors=spoil)
    line = fails("ask", movie, "What?", "--model", folder, "--check")
    assert "NaN" in line and "layers/01/mlp/up/kernel" in line
    succeeds("ask", movie, "What?", "--model", folder, *FAST)


def test_configs_that_do_not_do(fails, damaged, movie):
    for edit, text in {
        (lambda c: c.update(model_type="mamba", architectures=["MambaForCausalLM"])): "mamba",
        (lambda c: c.update(model_type="llama", architectures=["LlamaForCausalLM"])): "no vision tower",
        (lambda c: c.pop("hidden_size")): "hidden_size",
        (lambda c: c.pop("rms_norm_eps")): "rms_norm_eps",
        (lambda c: c.pop("video_token_id")): "video_token_id",
        (lambda c: c.pop("rope_scaling")): "mrope_section",
        (lambda c: c["rope_scaling"].update(mrope_section=[1, 1, 1])): "mrope_section",
        (lambda c: c["vision_config"].update(num_heads=3)): "num_heads",
        (lambda c: c.update(hidden_size="64")): "wrong kind",
    }.items():
        line = fails("ask", movie, "What?", "--model", damaged(config=edit))
        assert text in line, line


def test_models_that_are_not_there(fails, movie, tmp_path):
    for model, text in {
        tmp_path: "holds no config.json",
        tmp_path / "missing": "neither a folder that exists nor a Hugging Face hub id",
        movie: "is a file",
        "nobody/nothing-of-the-kind": "could it be fetched from the Hugging Face hub",
    }.items():
        for command in (["ask", movie, "What?", "--model"], ["inspect"]):
            line = fails(*command, model)
            assert text in line and line.endswith("."), line


def test_no_tokenizer(fails, damaged, movie):
    folder = damaged(without=["tokenizer.json", "tokenizer_config.json"])
    assert "has no tokenizer" in fails("ask", movie, "What?", "--model", folder)


def test_broken_tokenizer(fails, damaged, movie):
    folder = damaged()
    (folder / "tokenizer.json").write_text('{"version":')
    assert "tokenizer cannot be read" in fails("ask", movie, "What?", "--model", folder)


def test_prompts(fails, damaged, checkpoint, movie, monkeypatch):
    assert "question is empty" in fails("ask", movie, "What?", " ", "--model", checkpoint)
    assert "holds the video token" in fails("ask", movie, "<|video_pad|>?", "--model", checkpoint)
    short = damaged(config=lambda c: c.update(max_position_embeddings=200))
    monkeypatch.setattr(RetakeModel, "stream", None)  # nothing is watched for a question that cannot be answered
    line = fails("ask", movie, "What?", "Why? " * 60, "--model", short, *FAST)
    assert "too long" in line and "200 positions" in line
    assert "too long" in fails("ask", movie, "What?", "--model", short, "--max-new-tokens", 150)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--keep-ratio 0", "keep_ratio is 0.0"),
        ("--keep-ratio 1.5", "keep_ratio is 1.5"),
        ("--keep-ratio nan", "keep_ratio is nan"),
        ("--keep-ratio 0.5 --budget 100", "exactly one of keep_ratio and budget"),
        ("--budget 0", "budget is 0"),
        ("--chunk-frames 3", "chunk_frames is 3"),
        ("--dpselect-ratio 2", "dpselect_ratio is 2.0"),
        ("--dpselect none --dpselect-ratio 0.5", "dpselect_ratio below 1"),
        ("--yarn-factor 0.5", "yarn_factor is 0.5"),
        ("--method none --keep-ratio 0.5 --no-reforge", "--keep-ratio, --no-reforge cannot be used"),
        ("--fps -1", "fps is -1.0"),
        ("--max-frames 0", "max_frames is 0"),
        ("--sampler none", "sampler is 'none'"),
        ("--long-side 0", "long_side is 0"),
        ("--max-new-tokens 0", "max_new_tokens is 0"),
        ("--temperature -1", "temperature is -1.0"),
        ("--top-p 0", "top_p is 0.0"),
        ("--plot figure.gif", ".png or .pdf"),
        ("--plot missing/figure.png", "must be a folder that exists"),
    ],
)
def test_options_out_of_range(fails, checkpoint, movie, monkeypatch, options, text):
    monkeypatch.setattr(RetakeModel, "stream", None)  # found out before anything is watched
    line = fails("ask", movie, "What?", "--model", checkpoint, *options.split())
    assert text in line and line.endswith(".")


def test_of_the_api():
    with pytest.raises(lv.OptionError, match="exactly one of keep_ratio and budget"):
        lv.ReTaKe()


def test_a_budget_needs_a_length(checkpoint):
    model = lv.load(checkpoint, method=lv.ReTaKe(budget=100))
    with pytest.raises(lv.OptionError, match="budget needs the video's length"):
        model.begin("What?")


@pytest.mark.parametrize("argv", [[], ["ask"], ["ask", "a.mp4", "What?"], ["sing"], ["ask", "--keep-ratio", "much"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "longvid" in capsys.readouterr().err


# --- how it behaves as a program --------------------------------------------------------------------------------------


def test_interrupted(checkpoint, movie, monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RetakeModel, "watch", interrupt)
    figure = tmp_path / "figure.png"
    assert cli.main(["ask", str(movie), "What?", "--model", str(checkpoint), "--plot", str(figure)]) == 130
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "longvid: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_as_a_program(checkpoint, movie, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    del environment["LONGVID_COMPILATION_CACHE"]

    def run(*words):
        return subprocess.run([*COMMAND, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)

    done = run("ask", movie, "What is it?", "--model", checkpoint, *FAST)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert all(line.startswith(("longvid: ", "watched")) for line in done.stderr.splitlines()), done.stderr
    assert list((tmp_path / "longvid_jax" / "xla").iterdir())  # compiled programs wait for the next run
    done = run("ask", movie.with_name("missing.mp4"), "What?", "--model", checkpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"longvid: error: {movie.with_name('missing.mp4')}: no such file.\n"


def test_reader_that_stops_reading(checkpoint):
    with subprocess.Popen(
        [*COMMAND, "inspect", checkpoint, "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_is_instant():
    heavy = ("jax", "numpy", "av", "rich")
    code = f"import sys; from longvid_jax import cli; cli.parser(); print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_printable():
    assert cli.printable("a\x1b[2Jb\n\tü 東\x00") == "a\ufffd[2Jb\n\tü 東\ufffd"
