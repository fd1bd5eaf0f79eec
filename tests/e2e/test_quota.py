"""A VM over its quota on the host: it waits, is shown, hurts no other, and loses nothing."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tests.e2e.world import World, until

MIB = 1 << 20
WHOLE = b"".join(b"line %d\n" % number for number in range(400_000))
PRINT = "seq -f 'line %.0f' 0 399999"


def disk(world: World) -> dict[str, Any]:
    done = world.host("mix", "--json")
    found: dict[str, Any] = json.loads(done.stdout)[0]["disk"] if done.returncode == 0 else {}
    return found


def held(world: World, name: str = "stdout") -> bytes:
    path = world.logs / "Server" / "-1" / "a" / "1" / name
    return path.read_bytes() if path.exists() else b""


def whole(world: World) -> bool:
    return bool(held(world, "result.json")) and json.loads(held(world, "result.json"))["complete"]


def test_over_its_quota_a_vm_keeps_its_output_until_there_is_a_larger_one(world: World) -> None:
    world.stage("-1/a", PRINT)
    world.start_collector("--quota", "2M")
    world.start_daemon()
    until(lambda: disk(world).get("over"), "it is over its quota")
    until(lambda: b"exited" in held(world, "result.json"), "how the run ended is known all the same")
    assert not whole(world) and len(held(world)) < 2 * MIB
    assert WHOLE.startswith(held(world))
    assert disk(world)["quota"] == 2 * MIB
    assert b"over its quota of 2.0 MiB" in world.host("mix").stdout
    said = (world.path / "collector.log").read_text()
    assert "over its quota of 2.0 MiB" in said and "--quota" in said
    assert world.row("-1/a")["delivered"] not in ("yes", "almost")
    world.stop(world.collector)
    world.start_collector("--quota", "0")
    until(lambda: whole(world), "all of it")
    assert held(world) == WHOLE
    assert not disk(world)["over"]
    until(lambda: (world.logs / "Server.json").read_bytes().count(b"\n") == 400_000, "each line, once")


def test_it_goes_on_by_itself_when_there_is_room_again(world: World) -> None:
    earlier = world.logs / "Server~1"
    earlier.mkdir(parents=True)
    (earlier / "big").write_bytes(bytes(300 * MIB))
    world.stage("-1/a", PRINT)
    world.start_collector("--quota", "300M")
    until(lambda: disk(world).get("used", 0) >= 300 * MIB, "what lies there is counted")
    world.start_daemon()
    until(lambda: disk(world).get("over"), "it is over its quota")
    assert held(world) == b""
    shutil.rmtree(earlier)
    until(lambda: whole(world), "all of it")
    assert held(world) == WHOLE
    assert "there is room again" in (world.path / "collector.log").read_text()
