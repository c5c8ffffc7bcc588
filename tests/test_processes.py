# SPDX-License-Identifier: MIT
"""What surrounds the steps of a run: processes, the lock of --out, the work that scoring saves,
loaders, bars, and on which device the tests themselves run."""
import errno
import fcntl
import json
import os
import pty
import re
import runpy
import signal
import struct
import subprocess
import sys
import termios
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from torchvision.transforms import v2

import anchor
import calft
import carft
import common
import evaluate
from conftest import REPO, argv, content, environment, fails, log, parse, run, torchrun
from loops import import_copies, lone_loop

def popen(code, arguments=(), **streams):
    """Start code that may use the scripts, in a process group of its own."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment(), text=True,
                            cwd=REPO, start_new_session=True, **streams)

# ---- processes begin and end ---------------------------------------------------------------------
@pytest.mark.parametrize("kind, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_processes_are_joined_on_their_own_device(monkeypatch, kind, backend):
    """NCCL alone gathers what lies on GPUs, and all processes would share the first GPU if they
    chose theirs later. One process may download for half an hour while the others wait."""
    calls = mock.Mock()
    device = torch.device(kind, 0)
    monkeypatch.setattr(common, "DEVICE", device)
    monkeypatch.setattr(common.dist, "init_process_group", calls.join)
    monkeypatch.setattr(torch.cuda, "set_device", calls.choose)
    common.start_processes()
    assert not calls.join.called                            # one process is alone
    calls.reset_mock()
    monkeypatch.setattr(common, "WORLD", 2)
    common.start_processes()
    expected = [mock.call.join(backend, timeout=timedelta(minutes=30))]
    if kind == "cuda":
        expected.insert(0, mock.call.choose(device))
    assert calls.mock_calls == expected

def test_kernels_that_are_switched_off(monkeypatch):
    """TF32 rounds to ten bits, and cuDNN's attention may have NaN gradients under a mask."""
    monkeypatch.setattr(common, "DEVICE", torch.device("cpu"))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    common.start_processes()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()

@pytest.mark.parametrize("tasks, world, warns", [
    ("4", 1, True), ("4", 2, False), ("1", 1, False), (None, 1, False)])
def test_slurm_without_torchrun(monkeypatch, capsys, tasks, world, warns):
    """srun starts several tasks. Without torchrun each of them is a whole run, without a word."""
    monkeypatch.setattr(common.dist, "init_process_group", mock.Mock())
    monkeypatch.setattr(common, "WORLD", world)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    if tasks:
        monkeypatch.setenv("SLURM_NTASKS", tasks)
    common.start_processes()
    out, err = capsys.readouterr()
    assert out.startswith("warning: Slurm") == warns
    assert out.count("\n") == int(warns)
    assert err == ""

@pytest.mark.parametrize("script", ["calft", "carft", "anchor", "evaluate"])
def test_programs_take_leave(tiny_root, clip, captions, tmp_path, monkeypatch, script):
    """Run each script as a program: it joins the others, works, and takes leave at the end."""
    calls = []
    start = common.start_processes
    monkeypatch.setattr(common, "start_processes", lambda: calls.append("start") or start())
    monkeypatch.setattr(common, "Run", lambda *args: calls.append("run") or mock.Mock(
        results={"sets": {}}))                              # a run that has ended
    monkeypatch.setattr(common, "end_processes", lambda: calls.append("end"))
    monkeypatch.setattr(common, "image_features", lambda models, preprocesses, images, *args: (
        calls.append("run") or [torch.randn(len(images), 24) for _ in models]))
    monkeypatch.setattr(signal, "signal", mock.Mock())
    arguments = argv(tiny_root, clip(), tmp_path / "out")
    if script == "anchor":
        arguments += ["--captions", captions]
    if script == "evaluate":                                # lacks the flags of training
        arguments = ["--data", tiny_root, "--model", clip(), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(f"{REPO}/{script}.py", run_name="__main__")
    assert calls[0] == "start" and calls[-1] == "end"
    assert set(calls[1:-1]) == {"run"}

JOIN_AND_LEAVE = f"""
import sys
sys.path.insert(0, {REPO!r})
import common
common.start_processes()
x = common.torch.full((3,), 1.0 + common.RANK)
common.dist.all_reduce(x)
assert x.tolist() == [3, 3, 3] and common.dist.get_backend() == "gloo"
common.end_processes()
assert not common.dist.is_initialized()
"""

def test_two_processes_end_in_peace(tmp_path):
    """A process that does not leave its group is aborted at its end, or torch warns of it."""
    (tmp_path / "join.py").write_text(JOIN_AND_LEAVE)
    done = subprocess.run([*torchrun(2), tmp_path / "join.py"], env=environment(), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr
    assert "terminate" not in done.stderr

def test_one_process_has_no_group_to_leave():
    """Nothing fails where torchrun started nothing, as after every run on one GPU."""
    assert not dist.is_initialized()
    common.end_processes()

# ---- the lock of --out ---------------------------------------------------------------------------
@pytest.fixture
def begin(tiny_root, tmp_path):
    """Return begin(*flags), which makes the Run of a tiny root in tmp_path / "out"."""
    def begin(*flags):
        args = parse("--data", tiny_root, "--out", str(tmp_path / "out"), *flags)
        return common.Run(args, *common.read_data(args))
    return begin

STOP_AT_STEP_3 = """
import calft, common, multiprocessing, sys, time
log = common.Run.log
def stop(run, step, **values):
    log(run, step, **values)
    if step == 3:
        print("loaders", *(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
common.Run.log = stop
calft.main(sys.argv[1:])
"""

def test_one_run_at_a_time(tiny_root, clip, tmp_path):
    """Start a run twice: the second gets one line and touches nothing, as the two would overwrite
    each other's files. Once the first is killed, the same command goes on, although the first one's
    loaders outlive it by seconds."""
    arguments = argv(tiny_root, clip(), tmp_path / "out", "--workers", "2", "--save-every", "2")
    first = popen(STOP_AT_STEP_3, arguments, stdout=subprocess.PIPE)
    try:
        line = ""
        while not line.startswith("loaders"):
            line = first.stdout.readline()
            assert line                                     # otherwise it has ended
        loaders = [Path(f"/proc/{pid}/stat") for pid in line.split()[1:]]
        assert len(loaders) == 2
        before = content(tmp_path)
        for more in ([], ["--overwrite"], ["--overwrite", "--lr", "1"]):
            message = f"--out {tmp_path}/out is in use by another run"
            fails(calft.main, [*arguments, *more], message)
            assert content(tmp_path) == before
        first.kill()
        first.wait()
        lock = mock.Mock(path=tmp_path / "out")
        common.Run.lock(lock)                               # does not end the program
        assert not any(" Z " in loader.read_text() for loader in loaders)           # they live
        lock.lock_file.close()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    run(calft, tiny_root, clip(), tmp_path / "out", "--save-every", "2")
    assert [line["step"] for line in log(tmp_path / "out")] == [0, 1, 2, 3]

def test_a_file_system_without_locks(begin, monkeypatch):
    """Some network file systems have none. They are no reason to refuse a run."""
    lockf = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(common.fcntl, "lockf", lockf)
    begin()
    assert lockf.called

@pytest.mark.parametrize("error", [BlockingIOError, PermissionError])
def test_both_words_for_a_lock_that_is_taken(begin, monkeypatch, error):
    """POSIX leaves it to the system which of the two it says."""
    monkeypatch.setattr(common.fcntl, "lockf", mock.Mock(side_effect=error))
    fails(lambda flags: begin(*flags), [], "in use by another run")

def test_the_first_process_alone_takes_the_lock(begin, tmp_path, monkeypatch):
    """Processes of one run would keep each other out."""
    lockf = mock.Mock()
    monkeypatch.setattr(common.fcntl, "lockf", lockf)
    monkeypatch.setattr(common, "RANK", 1)
    begin()
    assert not lockf.called and not (tmp_path / "out").exists()
    monkeypatch.setattr(common, "RANK", 0)
    begin()
    assert lockf.call_count == 1
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "args.json"]

def test_no_lock_in_a_folder_that_is_not_ours(begin, tmp_path):
    """Refuse a folder without leaving a file there."""
    (tmp_path / "out" / "model").mkdir(parents=True)
    fails(lambda flags: begin(*flags), [], "--overwrite")
    assert os.listdir(tmp_path / "out") == ["model"]

# ---- processes that differ -----------------------------------------------------------------------
@pytest.mark.parametrize("column, ends", [(None, False), (0, True), (1, True), (-1, True)])
def test_nodes_with_other_files(begin, monkeypatch, column, ends):
    """Another process has another checkpoint, other results or other images: one line ends the run,
    which would train on different things, or wait for ever."""
    def gather(x):
        other = x.clone()
        if column is not None:
            other[0, column] += 1
        return torch.cat([x, other])
    monkeypatch.setattr(common, "gather", gather)
    if ends:
        fails(lambda flags: begin(*flags), [], "--out", "other images")
    else:
        begin()

@pytest.mark.parametrize("which", ["nothing", "last.pt", "results", "train", "val"])
def test_nodes_are_told_apart(tiny_root, tmp_path, monkeypatch, which):
    """Take two nodes that differ by one file, or by one image of training or val: so do the facts
    that they gather. Where val has another size, its features would never be gathered."""
    facts = {}
    for node in "ab":
        monkeypatch.setattr(common, "gather", lambda x: facts.update({node: x.tolist()}) or x)
        args = parse("--data", tiny_root, "--out", f"{tmp_path}/{node}")
        train, sets = common.read_data(args)
        images = {"train": train, "val": sets[0]}.get(which)
        if images and node == "b":
            images.paths = images.paths[:-1]
            images.labels = images.labels[:-1]
        run = common.Run(args, train, sets)
        if which == "last.pt" and node == "b":
            torch.save({"step": 3, "log": ""}, tmp_path / "b" / "last.pt")
        if which == "results" and node == "b":
            run.add_results({"zero_shot": {}})
        common.Run(args, train, sets)
    assert (facts["a"] == facts["b"]) == (which == "nothing")

# ---- lengths of texts ----------------------------------------------------------------------------
EIGHTS = {8, 16, 24, 32, 40, 48, 56, 64, 72, 77}

def test_lengths_of_texts(clip):
    """Cut one text of each length at a multiple of 8, or at the 77 there are: its feature is that
    of the text without any padding and of the text with all of it."""
    model, *_, tokenizer = common.load_model(clip(), "", "cpu")
    for n in range(1, 76):                                  # words, plus a start and an end
        full = tokenizer(["dog " * n])
        cut = common.tokenize(tokenizer, ["dog " * n])
        assert cut.shape == (1, min(length for length in EIGHTS if length >= n + 2))
        assert torch.equal(cut, full[:, :cut.shape[1]]) and not full[:, cut.shape[1]:].any()
        assert cut.is_contiguous()
        if n % 10 in (3, 5, 6):                             # 5, 7 and 8 tokens, ..., 77
            with torch.no_grad():
                ours = common.encode_text(model, cut)
                for tokens in (full[:, :n + 2], full):
                    theirs = common.encode_text(model, tokens)
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

@pytest.mark.parametrize("method, given, exact, few", [
    ("CaRot", ["--sd", "0"], 6, 1), ("ARF", [], 30, 10)])
def test_a_loop_meets_few_lengths(clip, method, given, exact, few):
    """Run a script's own loop on random batches: a GPU plans anew for each length of texts that it
    meets. Cut at the longest text of each batch, there would be many."""
    main, common = lone_loop(method, clip(), 4, range(30), *given)
    encode_text = common.encode_text
    longest = []
    lengths = []
    def spy(model, tokens, accum):
        longest.append(int(tokens.argmax(-1).max()) + 1)
        lengths.append(tokens.shape[1])
        return encode_text(model, tokens, accum)
    common.encode_text = spy
    main()
    assert len(set(longest)) >= exact
    assert len(set(lengths)) <= few and set(lengths) <= EIGHTS
    assert all(0 <= length - n < 8 for length, n in zip(lengths, longest))

# ---- what scoring saves --------------------------------------------------------------------------
def test_prompts_are_tokenised_once(tiny_root, clip, tmp_path, monkeypatch):
    """Count the calls of the tokenizer in a run that scores val after each of its epochs: one for
    each set with prompts of its own. ImageNet's 80,000 prompts take seconds each time."""
    calls = []
    tokenize = open_clip.SimpleTokenizer.__call__
    def spy(tokenizer, texts, *args):
        calls.append(texts)
        return tokenize(tokenizer, texts, *args)
    monkeypatch.setattr(open_clip.SimpleTokenizer, "__call__", spy)
    run(calft, tiny_root, clip(), tmp_path, steps=12)
    assert len(log(tmp_path, epochs=True)) == 2
    assert [len(texts) for texts in calls] == [5 * 3, 3 * 3]            # val's, and those of other

def test_logits_by_a_loop_over_columns():
    """Compare with one class after the other, in float64, for classes that cover one training class
    or several, over more than two blocks of rows."""
    generator = torch.Generator().manual_seed(0)
    u = common.normalize(torch.randn(2 * 4096 + 3, 24, generator=generator))
    head = common.normalize(torch.randn(9, 24, generator=generator))
    columns = [[4], [0, 7, 2], [8, 1], [3]]
    model = SimpleNamespace(logit_scale=torch.tensor(3.0))
    logits = common.set_logits(model, None, SimpleNamespace(columns=columns), u, head)
    S = torch.tensor(3.0).double().exp() * u.double() @ head.double().T
    for k, covered in enumerate(columns):
        largest = S[:, covered[0]]
        for column in covered[1:]:
            largest = torch.maximum(largest, S[:, column])
        torch.testing.assert_close(logits[:, k].double(), largest, rtol=1e-5, atol=1e-5)
    assert logits.shape == (2 * 4096 + 3, 4)

def test_a_head_of_its_own_by_open_clip(tiny_root, clip):
    """A set with classes that were not trained on is scored by open_clip's head of its classes."""
    model, *_, tokenizer = common.load_model(clip(), "", "cpu")
    other, = [images for images in common.read_data(parse("--data", tiny_root))[1]
              if images.columns is None]
    u = common.normalize(torch.randn(9, 24))
    logits = common.set_logits(model, tokenizer, other, u, torch.full((5, 24), torch.nan))
    templates = [template.replace("{}", "%s").__mod__ for template in other.templates]
    theirs = open_clip.build_zero_shot_classifier(
        model, tokenizer, other.classnames, templates, device="cpu")
    torch.testing.assert_close(logits, model.logit_scale.exp() * u @ theirs, rtol=1e-4, atol=1e-4)

def test_scoring_needs_no_more_memory_than_training(tiny_root, clip, monkeypatch):
    """Count the images that the tower has at once: as many as a chunk of --accum. Scores stay."""
    model, _, preprocess, tokenizer = common.load_model(clip(), "", "cpu")
    encode_image = common.encode_image
    sizes = []
    monkeypatch.setattr(common, "encode_image", lambda model, x: (
        sizes.append(len(x)) or encode_image(model, x)))
    nll = []
    for accum in ("1", "4"):
        sizes.clear()
        args = parse("--data", tiny_root, "--accum", accum)             # batches of 8
        _, sets = common.read_data(args)
        results = common.evaluate(model, tokenizer, preprocess, sets, args)
        assert max(sizes) == 8 // int(accum) and sum(sizes) == sum(map(len, sets))
        nll.append([scores["nll"] for scores in results["sets"].values()])
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)

def test_wise_crops_each_image_once(tiny_root, clip, tmp_path, monkeypatch):
    """Score three mixtures at once: each image is cropped once for all, and each mixture has the
    scores that it has alone."""
    run(carft, tiny_root, clip(), tmp_path / "run", "--lr", "0.01")
    crop = v2.Compose.forward
    crops = []
    monkeypatch.setattr(v2.Compose, "forward", lambda *args: crops.append(args) or crop(*args))
    def scored(*alphas):
        crops.clear()
        out = tmp_path / "-".join(alphas)
        evaluate.main(["--model", f"{tmp_path}/run", "--out", str(out), "--workers", "0", "--wise",
                       *alphas])
        return common.read_json(out / "results.json")
    columns = scored("0", "0.5", "1")
    assert len(crops) == 15 + 9 + 9 + 15
    assert len({str(column["sets"]) for column in columns.values()}) == 3
    for alpha in ("0", "0.5", "1"):
        column, = scored(alpha).values()
        assert columns[f"{tmp_path}/run {alpha}"] == column

# ---- loaders -------------------------------------------------------------------------------------
def test_a_crop_is_that_of_a_forked_generator(tiny_root, clip):
    """Crop under torch's own fork of all generators, which costs much: the crops are the same, and
    the global generator does not notice ours."""
    train, _ = common.read_data(parse("--data", tiny_root))
    _, crop, *_ = common.load_model(clip(), "", "cpu")
    data = common.TrainImages(train, crop, 5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for index in (0, 39, 40, 100):
        ours, label, row, _ = data[index]
        image, _ = common.read_image(train.paths[row])
        seed = np.random.SeedSequence([5, index // 40, row]).generate_state(2)[0]
        with torch.random.fork_rng():
            torch.manual_seed(int(seed))
            theirs = crop(image)
        assert torch.equal(ours, theirs) and label == train.labels[row]
    assert torch.equal(torch.rand(3), expected)

@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_arfs_loaders_share_the_workers(tiny_root, clip, captions, pool, tmp_path, monkeypatch,
                                        workers):
    """Images and pairs have a loader each, and both together have --workers processes."""
    load = common.load
    of_training = []
    def spy(data, indices, batch_size, args, title=None):
        if not title:
            of_training.append(args.workers)
        alone = parse("--workers", "0", "--data", tiny_root)
        return load(data, indices, batch_size, alone, title)
    monkeypatch.setattr(common, "load", spy)
    run(anchor, tiny_root, clip(), tmp_path / "out", "--captions", captions, "--pool", pool,
        "--workers", str(workers), steps=1)
    assert len(of_training) == 2 and sum(of_training) == workers
    assert abs(of_training[0] - of_training[1]) <= 1

@pytest.mark.parametrize("cores, local, workers", [
    (128, 1, 16), (128, 8, 16), (24, 8, 3), (8, 1, 8), (8, 16, 0)])
def test_workers_for_each_gpu(monkeypatch, cores, local, workers):
    """On GPUs the processes share the cores that Slurm or taskset leaves them, which may be fewer
    than the machine has. More than 16 loaders a GPU only take memory."""
    monkeypatch.setattr(common, "DEVICE", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", mock.Mock(return_value=True))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert common.make_parser("", "out").get_default("workers") == workers

# ---- bars and lines ------------------------------------------------------------------------------
def numbers(line):
    """Return {name: number} of a plain line such as "FT step 3, loss 0.5"."""
    _, values = line.split(" ", 1)
    return {name: float(value) for name, value in (cell.split(" ") for cell in values.split(", "))}

def test_a_log_file_has_lines_and_a_terminal_a_bar(tiny_root, clip, tmp_path):
    """Run with stderr in a pipe, as under Slurm, and with a terminal: bars would fill a log file
    with copies of themselves, and without them it needs lines to show that the run goes on."""
    code = "import carft, sys; carft.main(sys.argv[1:])"
    own = ["--log-every", "2", "--eval-every", "0"]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))       # rows, columns
    in_a_pipe = popen(code, argv(tiny_root, clip(), tmp_path / "a", *own, steps=5),
                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    in_a_terminal = popen(code, argv(tiny_root, clip(), tmp_path / "b", *own, steps=5),
                          stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    with pytest.raises(OSError), open(master, "rb", buffering=0) as terminal:
        while True:                                         # until nobody has it open any more
            shown += terminal.read(1000)
    plain, errors = in_a_pipe.communicate()
    beside_a_bar, _ = in_a_terminal.communicate()
    assert in_a_pipe.returncode == in_a_terminal.returncode == 0
    assert not re.search(r"\r|it/s|s/it|%\|", errors), errors
    lines = [numbers(line) for line in plain.splitlines() if line.startswith("CAR-FT step")]
    assert [line["step"] for line in lines] == [0, 2, 4]
    written = Path(tmp_path, "a", "log.jsonl").read_text().splitlines()
    for line, text in zip(lines, written, strict=True):
        assert line == pytest.approx(json.loads(text), rel=1e-5)
        assert line.keys() == {"step", "loss", "cross_entropy", "context_kl", "lr", "images_per_s"}
    assert "CAR-FT:" in shown.decode() and "5/5" in shown.decode()
    assert "fine-tuned" in beside_a_bar and "CAR-FT step" not in beside_a_bar

def test_a_log_file_has_each_line_at_once(tmp_path, monkeypatch):
    """Read a log file while the run goes on: lines that wait in a buffer come hours late, and a
    kill or Ctrl-C loses them."""
    path = tmp_path / "slurm.out"
    with open(path, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        common.make_parser("", "out")                       # it sets the streams up
        common.say("CAR-FT step 0")
        assert path.read_text() == "CAR-FT step 0\n"

def test_images_per_second(begin, monkeypatch):
    """Log by a clock of our own, from the start and after a resume: images of all processes since
    the line before, by the seconds since then. Scoring val takes no part in it."""
    clock = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    def rates(first_step, seconds):
        run = begin("--overwrite")                          # deletes the log of the one before
        run.first_step = first_step
        for step, _ in run.steps(iter(range(100)), 9):
            clock[0] += seconds
            if step % 3 == 0 or step == 8:
                run.log(step, loss=torch.tensor(1.0), lr=0.1)
            if step == 4:
                clock[0] += 1000
                run.log(step, val_top1=0.5, val_ece=0.1)
        lines = [json.loads(text) for text in (run.path / "log.jsonl").read_text().splitlines()]
        return {(line["step"], len(line)): line.get("images_per_s") for line in lines}
    assert rates(0, 0.5) == {(0, 4): 16, (3, 4): 16, (4, 3): None, (6, 4): 16, (8, 4): 16}
    assert rates(5, 2) == {(6, 4): 4, (8, 4): 4}

# ---- the device of the tests ---------------------------------------------------------------------
@pytest.fixture
def conftest_with(monkeypatch):
    """Return conftest_with(*given): the names of a conftest.py that pytest reads when it is given
    these arguments on a machine with a card."""
    def conftest_with(*given):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(sys, "argv", ["pytest", *given])
        return runpy.run_path(f"{REPO}/tests/conftest.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")          # so that it is set back at the end
    monkeypatch.setattr(torch.cuda, "is_available", lambda: (
        os.environ.get("CUDA_VISIBLE_DEVICES") != ""))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", mock.Mock(return_value=True))
    return conftest_with

def device_and_precision(environment):
    """Return where a script would run in an environment, and its default precision there."""
    with mock.patch.dict(os.environ, environment, clear=True):
        common, _ = import_copies("calft")
        return common.DEVICE.type, common.make_parser("", "out").get_default("precision")

@pytest.mark.parametrize("given, device, precision", [
    ("", "cpu", "fp32"),
    ("-q TESTS", "cpu", "fp32"),
    ("TESTS/test_speed.py", "cpu", "fp32"),
    ("TESTS/test_cuda.py", "cuda", "bf16"),
    ("-s TESTS/test_cuda.py::test_figures", "cuda", "bf16"),
    ("TESTS/test_cuda.py TESTS/test_speed.py", "cpu", "fp32"),
    ("TESTS --ignore=TESTS/test_cuda.py", "cpu", "fp32"),
    ("TESTS --deselect TESTS/test_cuda.py::test_x", "cpu", "fp32")])
def test_the_tests_of_the_cpu_run_there(conftest_with, given, device, precision):
    """On a machine with a card, tests compare runs of their own process with those of children,
    bit by bit. So both must run on the CPU in its precision, unless test_cuda.py alone is asked
    for, which says the precision of each run."""
    names = conftest_with(*given.replace("TESTS", f"{REPO}/tests").split())
    assert device_and_precision(dict(os.environ)) == (device, precision)
    assert device_and_precision(names["environment"]()) == ("cpu", "fp32")
