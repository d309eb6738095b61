"""Ranks of two machines: namespaces of Linux, each with a network, a host name and processes."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest
from test_ranks import check_folders, command

from liar_ext import distributed
from liar_ext.cli.main import main

BECOME = 'hostname "$0" && mount -t proc proc /proc && exec "$@"'


def on(name: str) -> list[str]:
    """Return what starts a command on a machine."""
    become = ["unshare", "--uts", "--pid", "--mount", "--kill-child", "sh", "-c", BECOME, name]
    return ["ip", "netns", "exec", name, *become]


@pytest.fixture
def machines():
    """Names of two network namespaces, joined by a cable; its ends are called as they are."""
    if not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("needs ip, unshare and hostname")
    names = [f"liar{os.getpid() % 100000}{end}" for end in "ab"]
    link = ["link", "add", names[0], "type", "veth", "peer", "name", names[1]]
    commands = [*(["netns", "add", name] for name in names), link]
    for number, name in enumerate(names):
        commands.append(["link", "set", name, "netns", name])
        commands.append(["-n", name, "addr", "add", f"10.9.0.{number + 1}/24", "dev", name])
        commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", name)]
    with ExitStack() as stack:
        for name in names:
            delete = ["ip", "netns", "delete", name]
            stack.callback(subprocess.run, delete, capture_output=True)
        for each in commands:
            if subprocess.run(["ip", *each], capture_output=True).returncode:
                pytest.skip("may not make networks")
        if subprocess.run([*on(names[0]), "true"], capture_output=True).returncode:
            pytest.skip("may not make namespaces")
        yield names


@pytest.mark.exhaustive
def test_two_machines_make_what_one_process_makes(machines, llama_folder, corpus, tmp_path):
    said = [tmp_path / f"said {number}" for number in range(2)]
    assert main(command(llama_folder, corpus, tmp_path / "alone", "--quiet")) == 0
    with ExitStack() as stack:
        running = []
        for number, name in enumerate(machines):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            launch += ["--nproc-per-node", "1", "--node-rank", str(number)]
            launch += ["--master-addr", "10.9.0.1", "--master-port", "29500", "-m", "liar_ext"]
            launch += command(llama_folder, corpus, tmp_path / f"of {number}")
            more = {"PYTHONPATH": os.pathsep.join(sys.path), distributed.INTERFACE: name}
            out = stack.enter_context(said[number].open("w"))
            given = {"stdout": out, "stderr": out, "env": os.environ | more}
            running.append(subprocess.Popen([*on(name), *launch], **given))
            stack.callback(running[-1].kill)
        codes = [each.wait(300) for each in running]
    assert codes == [0, 0], "\n".join(each.read_text() for each in said)
    check_folders(tmp_path / "of 0", tmp_path / "alone")
    assert not (tmp_path / "of 1").exists()
    assert ": saved after" in said[0].read_text() and ": saved after" not in said[1].read_text()


@pytest.mark.parametrize(
    ("here", "interface", "hint"), [(1, "", True), (2, "", False), (1, "eth0", False)]
)
def test_machines_that_cannot_meet_hear_of_the_interface(
    here, interface, hint, llama_folder, corpus, tmp_path, monkeypatch, capsys
):
    given = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "10.9.0.1", "MASTER_PORT": 29500}
    for name, value in {**given, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv(distributed.INTERFACE, raising=False)
    if interface:
        monkeypatch.setenv(distributed.INTERFACE, interface)

    def lost(*_, **__):
        raise RuntimeError("timed out connecting")

    monkeypatch.setattr(distributed.dist, "rendezvous", lost)
    assert main(command(llama_folder, corpus, tmp_path / "out")) == 3
    error = capsys.readouterr().err
    assert "error: another process of the job has ended or can't be reached: timed out" in error
    assert (distributed.INTERFACE in error) == hint
