"""Places: one meaning for everything that a user can write, or a refusal that names it."""

import os
import traceback
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

from distnadam import DistNadam, Options
from distnadam.checkpoint import store
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.cli import main
from distnadam.errors import CheckpointError, ConfigError
from distnadam.interop import export_checkpoint, import_checkpoint
from distnadam.places import above, below, has_secret, local_path, place, shown
from distnadam.training.fit import fit
from distnadam.training.tasks.digits import Digits

PARAMS = {"w": np.ones(3, np.float32)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, below the home directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    return work


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a", "{here}/runs/a"),
        (Path("runs") / "a", "{here}/runs/a"),
        (b"runs/\xff", "{here}/runs/\udcff"),
        ("runs/a/", "{here}/runs/a"),
        (".", "{here}"),
        ("../x", "{home}/x"),
        ("~", "{home}"),
        ("~/x", "{home}/x"),
        (Path("~/x"), "{home}/x"),
        ("./~x", "{here}/~x"),
        ("./nas:/x", "{here}/nas:/x"),
        ("a b/[c]\n名", "{here}/a b/[c]\n名"),
        ("exp:1/lr=0.1?x#y", "{here}/exp:1/lr=0.1?x#y"),
        ("//tmp/x", "/tmp/x"),
        (PurePosixPath("//tmp/x"), "/tmp/x"),
        ("file:///tmp/a%20b?c#d", "/tmp/a b?c#d"),
        ("FILE://localhost/tmp/x/", "/tmp/x"),
        ("local:///tmp/a%20b", "/tmp/a%20b"),
        ("s3://bucket/run/", "s3://bucket/run"),
        ("S3://Bucket/Run", "s3://Bucket/Run"),
        ("gs://bucket", "gs://bucket"),
        ("hdfs:///user/me", "hdfs:///user/me"),
        ("sftp://me:word@nas:22/data/run", "sftp://me:word@nas:22/data/run"),
        ("webhdfs://n:9870/u/?user=x", "webhdfs://n:9870/u?user=x"),
        ("memory://run", "memory://run"),
    ],
    ids=repr,
)
def test_a_place_is_an_absolute_path_or_the_url_as_it_was_written(
    here: Path, given: Any, expected: str
) -> None:
    assert place(given, "path") == expected.format(here=here, home=here.parent)
    assert place(place(given, "path"), "path") == place(given, "path")


def test_a_path_as_a_url_is_that_path(tmp_path: Path) -> None:
    path = tmp_path / "100% 名 #?"
    assert place(path.as_uri(), "path") == str(path)


REFUSED: list[Any] = [
    "",
    "  \n",
    "a\0b",
    "s3://b/\0",
    None,
    7,
    ["runs"],
    Path("s3://bucket/run"),
    Path("runs") / "s3://bucket/run",
    os.path.join("runs", "s3://bucket"),
    os.path.abspath("s3://bucket"),
    "s3:/bucket/run",
    "s3:bucket/run",
    "gs:/x",
    "nas:/data/run",
    "me@nas:/data/run",
    "C:/runs",
    "C:\\runs",
    "file:/tmp/x",
    "file:x",
    "file://tmp/x",
    "file://",
    "local://x",
    "://x",
    "1s3://x",
    " s3://bucket/run",
    "s3 ://bucket/run",
    "s3://",
    "s3:///run",
    "gs:///",
    "s3://bucket/https://x",
    "simplecache::s3://bucket/run",
    "zip://a.zip::/tmp/b",
    "~nobody-of-this-name/x",
]


@pytest.mark.parametrize("given", REFUSED, ids=repr)
def test_what_is_no_place_is_refused_by_name_wherever_it_is_given(given: Any, here: Path) -> None:
    for refuse in (
        lambda: place(given, "path"),
        lambda: open_directory(given),
        lambda: DistNadam.restore(given, backend="local"),
        lambda: export_checkpoint(here, given, to="numpy"),
        lambda: import_checkpoint(given, here, source_format="numpy"),
    ):
        with pytest.raises(ConfigError, match=r"(path|output|source)"):
            refuse()
    if given is not None:
        for refuse in (
            lambda: Options(checkpoint_dir=given),
            lambda: fit(Digits(), steps=1, backend="local", checkpoint_dir=given),
        ):
            with pytest.raises(ConfigError, match="checkpoint_dir"):
                refuse()
    with (
        DistNadam(backend="local").build(PARAMS) as optimizer,
        pytest.raises(ConfigError, match="path"),
    ):
        optimizer.save(given)
    assert list(here.iterdir()) == []


def test_a_relative_path_is_refused_where_the_working_directory_is_gone(here: Path) -> None:
    here.rmdir()
    with pytest.raises(ConfigError, match="the working directory is gone"):
        place("runs", "path")
    assert place("/tmp/runs", "path") == "/tmp/runs"


def test_what_must_be_a_file_of_this_machine_is_no_url() -> None:
    with pytest.raises(ConfigError, match=r"output='s3://b/x.npz' must be a path of this machine"):
        local_path("s3://b/x.npz", "output")
    assert local_path("file:///tmp/x.npz", "output") == "/tmp/x.npz"


def test_a_relative_checkpoint_dir_means_the_directory_where_it_was_given(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(checkpoint_dir="runs/safe")
    monkeypatch.chdir(tmp_path)
    assert options.checkpoint_dir == str(here / "runs" / "safe")
    with DistNadam(backend="local", options=options).build(PARAMS) as optimizer:
        assert optimizer.get_config()["options"]["checkpoint_dir"] == options.checkpoint_dir
    assert store.find(here / "runs" / "safe")[1].saved_options == options


@pytest.mark.parametrize(
    ("of", "child"),
    [
        ("/runs", "/runs/x"),
        ("s3://bucket", "s3://bucket/x"),
        ("webhdfs://n:9870/u?user=me", "webhdfs://n:9870/u/x?user=me"),
        ("/runs?y", "/runs?y/x"),
    ],
)
def test_a_name_in_a_place_comes_before_the_query_of_a_url(of: str, child: str) -> None:
    assert below(of, "x") == child
    assert above(child) == of


class Hosted(MemoryFileSystem):  # type: ignore[misc]
    """A file system of several hosts, as sftp's: the host is no part of its paths."""

    protocol = "hosted"
    cachable = False
    hosts: ClassVar[dict[str, tuple[dict[str, Any], list[str]]]] = {}

    def __init__(self, host: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.store, self.pseudo_dirs = self.hosts.setdefault(host, ({}, [""]))

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        rest = path.partition("://")[2].partition("/")[2] if "://" in path else path
        return "/" + rest.partition("?")[0].strip("/")

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, str]:
        return {"host": url.partition("://")[2].partition("/")[0]}


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> type[Hosted]:
    monkeypatch.setattr(Hosted, "hosts", {})
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    return Hosted


@pytest.mark.parametrize("query", ["", "?user=me"])
def test_a_checkpoint_is_on_the_host_that_its_url_names(hosted: type[Hosted], query: str) -> None:
    root = f"hosted://me@nas:22/data/run{query}"
    options = Options(checkpoint_dir=root)
    with DistNadam(num_shards=2, backend="local", options=options).build(PARAMS) as optimizer:
        optimizer.apply_gradients(PARAMS)
        path = optimizer.save(root)
        optimizer.save(root, wait=False).result()  # type: ignore[union-attr]
    assert path == f"hosted://me@nas:22/data/run/step_00000001{query}"
    assert [str(step) for step in store.step_directories(root)][-1] == path
    assert set(hosted.hosts) == {"me@nas:22"}
    for place_of in (path, root):
        with DistNadam.restore(place_of, backend="local") as restored:
            assert restored.iterations == 1


def test_a_query_that_a_file_system_takes_for_its_path_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"memory:// takes its \? or #"):
        open_directory("memory://run?x=1")


def test_what_a_file_system_says_of_its_host_is_an_error_of_ours(
    hosted: type[Hosted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: Hosted, **kwargs: Any) -> None:
        raise ConnectionRefusedError("port 22")

    monkeypatch.setattr(hosted, "__init__", unreachable)
    with pytest.raises(CheckpointError, match="hosted://nas/x: cannot be opened: Connection"):
        open_directory("hosted://nas/x")


SECRET = "s3cr3t%2Fword"
"""A password, as it is written in a URL."""
URL = f"hosted://me:{SECRET}@nas:22/data/run?user=me&delegation={SECRET}"
SHOWN = "hosted://me:***@nas:22/data/run?user=me&delegation=***"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://key:{}@host/run", "s3://key:***@host/run"),
        ("s3://key:{}@host:9000/run@2", "s3://key:***@host:9000/run@2"),
        ("s3://key:{}/with/slashes+@host/run", "s3://key:***@host/run"),
        ("sftp://me:{}@@nas:22/data", "sftp://me:***@nas:22/data"),
        ("SFTP://:{}@nas/data", "SFTP://:***@nas/data"),
        ("https://host/run?sv=1&sig={}&x=2", "https://host/run?sv=1&sig=***&x=2"),
        ("webhdfs://n:98/u?user=x&delegation={0}", "webhdfs://n:98/u?user=x&delegation=***"),
        ("abfs://c@a.net/run?SAS_Token={}#f", "abfs://c@a.net/run?SAS_Token=***#f"),
        ("s3://b/r?X-Amz-Signature={0}&a=b", "s3://b/r?X-Amz-Signature=***&a=b"),
        ("s3://b/r?aws_secret_access_key={}", "s3://b/r?aws_secret_access_key=***"),
        ("ftp://u:{}@h/a?password={}", "ftp://u:***@h/a?password=***"),
        ("s3:/key:{}@host/run", "s3:/key:***@host/run"),
    ],
)
def test_a_url_is_shown_without_what_opens_it(url: str, expected: str) -> None:
    given = url.format(SECRET, SECRET)
    assert has_secret(given)
    assert shown(given) == expected
    assert shown(f"a, {given} b '{given}' {given}") == f"a, {expected} b '{expected}' {expected}"


@pytest.mark.parametrize(
    "given",
    [
        "s3://bucket/run",
        "s3://host:9000/run@2",
        "sftp://me@nas:22/a:b@c",
        "http://[::1]:9000/x@y",
        "webhdfs://n:9870/u?user=x",
        "/data/a:b@c?token=x",
        "see s3://b/c, me:you@home",
    ],
)
def test_what_has_no_secret_is_shown_as_it_is(given: str) -> None:
    assert shown(given) == given
    assert not has_secret(given)


@pytest.mark.parametrize(
    "given",
    [f"s3:/k:{SECRET}@h/x", f"s3://k:{SECRET}@h/x\0", f"s3://k:{SECRET}@h/https://x", URL + "::x"],
)
def test_a_refusal_of_what_is_no_place_has_no_secret(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options(checkpoint_dir=given)
    assert SECRET not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_run_on_a_url_with_a_password_shows_and_keeps_it_nowhere(
    hosted: type[Hosted],
    here: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    options = Options(checkpoint_dir=URL)
    for steps in (2, 4):
        history = fit(
            Digits(),
            steps=steps,
            backend="local",
            checkpoint_dir=URL,
            save_every=1,
            optimizer=DistNadam(options=options),
        )
    saved = str(history.checkpoints[-1])
    assert saved == URL.replace("run?", "run/step_00000004?"), "what was given opens it"
    assert store.find(URL)[1].saved_options.checkpoint_dir is None
    said = [*capsys.readouterr(), caplog.text, repr(options), repr(history), repr(DistNadam())]
    files = [path.read_bytes() for path in here.rglob("*") if path.is_file()]
    kept = [
        bytes(file.getbuffer()) for files, _ in hosted.hosts.values() for file in files.values()
    ]
    assert f"resuming from {SHOWN.replace('run?', 'run/step_00000002?')}" in said[1]
    assert files and kept
    for secret in (SECRET, unquote(SECRET)):
        assert not any(secret in text for text in said)
        assert not any(secret.encode() in content for content in (*files, *kept))


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"], ["diff", "--json"]],
    ids=" ".join,
)
def test_a_command_on_a_url_with_a_password_prints_it_without(
    hosted: type[Hosted], command: list[str]
) -> None:
    with DistNadam(backend="local").build(PARAMS) as optimizer:
        assert optimizer.save(URL) == URL.replace("run?", "run/step_00000000?")
    done = CliRunner().invoke(main, [*command, URL, *([URL] if command[0] == "diff" else [])])
    assert done.exit_code == 0, done.output
    assert SECRET not in done.output
    gone = CliRunner().invoke(main, ["inspect", URL.replace("run", "gone")])
    assert gone.exit_code == 1
    assert SECRET not in gone.output


def test_what_a_file_system_says_of_a_url_with_a_password_is_said_without(
    hosted: type[Hosted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Hosted, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(f"me:{unquote(SECRET)} may not, {SECRET}")

    directory = open_directory(URL)
    monkeypatch.setattr(hosted, "ls", refused)
    with pytest.raises(CheckpointError, match="may not") as caught:
        directory.files()
    monkeypatch.setattr(hosted, "__init__", refused)
    with pytest.raises(CheckpointError, match="may not") as opening:
        open_directory(URL)
    for error in (caught, opening):
        printed = "".join(traceback.format_exception(error.value))
        assert "PermissionError: me:*** may not" in printed
        assert SECRET not in printed
        assert unquote(SECRET) not in printed


def test_what_a_conversion_returns_is_shown_without_the_password(
    hosted: type[Hosted], here: Path
) -> None:
    with DistNadam(backend="local").build(PARAMS) as optimizer:
        optimizer.save(URL)
    assert export_checkpoint(URL, here / "state.npz", to="numpy").path == str(here / "state.npz")
    done = import_checkpoint(here / "state.npz", URL.replace("run", "other"), source_format="numpy")
    assert done.path == URL.replace("run?", "other/step_00000000?")
    assert SECRET not in repr(done)
