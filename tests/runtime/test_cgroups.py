"""Memory limits of control groups, read from trees as docker, systemd, Kubernetes and Android make them."""

from __future__ import annotations

import pytest

from edge_tcur_runtime.cgroups import Limits, read_limits

MIB = 2**20
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
ROOT = "24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
MAX = {"memory.max": "max", "memory.high": "max"}


def tree(root, cgroup, mounts, files):
    """A machine's /proc and the files of its control groups (path -> value), under `root`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    if mounts is not None:
        (root / "proc/self/mountinfo").write_text(ROOT + mounts)
    for place, value in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return read_limits(root)


def group(place, **values):
    """The memory files of a group of version 2; every group but the root has all of them."""
    files = {**MAX, **{f"memory.{name}": value for name, value in values.items()}}
    return {f"sys/fs/cgroup/{place}/{name}": value for name, value in files.items()}


def test_docker_in_a_namespace_of_its_own(tmp_path):
    """`docker run -m 512m`: the container's group is the root that it sees."""
    assert tree(tmp_path, "0::/\n", V2, group(".", max=512 * MIB)) == Limits(512 * MIB, None)


def test_docker_without_a_namespace_sees_its_place_in_the_host(tmp_path):
    """`--cgroupns=host`: the whole tree, and the scope in it."""
    scope = f"system.slice/docker-{'a' * 64}.scope"
    found = tree(
        tmp_path, f"0::/{scope}\n", V2, group("system.slice", max=900 * MIB) | group(scope, max=256 * MIB)
    )
    assert found == Limits(256 * MIB, None)


def test_a_mount_that_begins_at_the_containers_group(tmp_path):
    """Only the container's part of the tree is mounted, the path is the host's."""
    scope = "/system.slice/docker-a.scope"
    mount = V2.replace(" / /sys/fs/cgroup", f" {scope} /sys/fs/cgroup")
    files = group(".", max=300 * MIB) | group("worker", max=100 * MIB)
    assert tree(tmp_path, f"0::{scope}/worker\n", mount, files) == Limits(100 * MIB, None)


def test_a_systemd_service_is_limited_by_itself_and_by_its_slices(tmp_path):
    """``MemoryMax=`` of a slice above counts for all that is in it; ``MemoryHigh=`` slows down."""
    service = "user.slice/user-1000.slice/user@1000.service/app.slice/tune.service"
    files = group("user.slice")
    files |= group("user.slice/user-1000.slice", max=400 * MIB)
    files |= group("user.slice/user-1000.slice/user@1000.service", high=350 * MIB)
    files |= group("user.slice/user-1000.slice/user@1000.service/app.slice", high=380 * MIB)
    files |= group(service, max=1000 * MIB)
    assert tree(tmp_path, f"0::/{service}\n", V2, files) == Limits(400 * MIB, 350 * MIB)


def test_a_pod_of_kubernetes(tmp_path):
    """The pod's group limits all containers of it; the memory controller is on in each level."""
    place = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-x.scope"
    parts = place.split("/")
    files = group(parts[0]) | group("/".join(parts[:2])) | group("/".join(parts[:3]), max=128 * MIB)
    files |= group(place, max=256 * MIB)
    assert tree(tmp_path, f"0::/{place}\n", V2, files) == Limits(128 * MIB, None)


def test_android_mounts_the_memory_controller_of_version_1_elsewhere(tmp_path):
    mounts = V2 + "40 24 0:31 / /dev/memcg rw,nosuid,nodev,noexec,relatime shared:8 - cgroup none rw,memory\n"
    cgroup = "4:memory:/apps/uid_10123/pid_4242\n1:blkio:/\n0::/uid_10123/pid_4242\n"
    files = {
        "dev/memcg/memory.limit_in_bytes": 9223372036854771712,
        "dev/memcg/apps/memory.limit_in_bytes": 9223372036854771712,
        "dev/memcg/apps/uid_10123/memory.limit_in_bytes": 700 * MIB,
        "dev/memcg/apps/uid_10123/pid_4242/memory.limit_in_bytes": 800 * MIB,
        "sys/fs/cgroup/uid_10123/pid_4242/cgroup.procs": 4242,
    }
    assert tree(tmp_path, cgroup, mounts, files) == Limits(700 * MIB, None)


def test_android_with_version_2_alone(tmp_path):
    """Android 12 and later: the groups of an app and of its process; the controller may be on in the first
    alone."""
    files = group("uid_10123", max=600 * MIB, high=500 * MIB)
    assert tree(tmp_path, "0::/uid_10123/pid_77\n", V2, files) == Limits(600 * MIB, 500 * MIB)


def test_both_versions_beside_each_other(tmp_path):
    """systemd's hybrid layout: version 1 has the memory controller, version 2 has none."""
    mounts = (
        "31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n"
        "35 30 0:32 / /sys/fs/cgroup/memory rw shared:15 - cgroup cgroup rw,memory\n"
        "36 30 0:33 / /sys/fs/cgroup/cpu,cpuacct rw shared:16 - cgroup cgroup rw,cpu,cpuacct\n"
    )
    cgroup = (
        "9:memory:/system.slice/a.service\n3:cpu,cpuacct:/\n1:name=systemd:/x\n0::/system.slice/a.service\n"
    )
    files = {"sys/fs/cgroup/memory/system.slice/a.service/memory.limit_in_bytes": 64 * MIB}
    assert tree(tmp_path, cgroup, mounts, files) == Limits(64 * MIB, None)


def test_docker_of_version_1_mounts_its_own_group(tmp_path):
    mount = "35 30 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": 200 * MIB}
    assert tree(tmp_path, "9:memory:/docker/abc\n", mount, files) == Limits(200 * MIB, None)


def test_a_group_outside_of_what_is_visible_has_no_known_limit(tmp_path):
    """A process that was moved out of its namespace: what is mounted limits others."""
    assert tree(tmp_path, "0::/../other\n", V2, group(".", max=MIB)) == Limits(None, None)


def test_a_mount_of_something_above_the_namespace_limits_too(tmp_path):
    mount = V2.replace(" / /sys/fs/cgroup", " /.. /sys/fs/cgroup")
    assert tree(tmp_path, "0::/\n", mount, group(".", max=90 * MIB)) == Limits(90 * MIB, None)


def test_a_group_that_is_gone_is_limited_by_those_above(tmp_path):
    files = group("a.slice", max=70 * MIB)
    assert tree(tmp_path, "0::/a.slice/b.scope (deleted)\n", V2, files) == Limits(70 * MIB, None)


@pytest.mark.parametrize("mounts", [None, "", "damaged\n31 x / - \n"])
def test_without_a_list_of_mounts_the_usual_places_are_read(tmp_path, mounts):
    assert tree(tmp_path, "0::/a\n", mounts, group("a", max=5 * MIB)) == Limits(5 * MIB, None)


def test_a_mount_point_with_spaces(tmp_path):
    mount = V2.replace("/sys/fs/cgroup", "/my\\040groups")
    assert tree(tmp_path, "0::/\n", mount, {"my groups/memory.max": 8 * MIB}) == Limits(8 * MIB, None)


def test_what_is_no_limit_is_none(tmp_path):
    files = group("a", max="max", high=2**63 - 4096) | group(".", max="", high="much")
    assert tree(tmp_path, "0::/a\n", V2, files) == Limits(None, None)


def test_a_limit_of_nothing_is_one(tmp_path):
    assert tree(tmp_path, "0::/a\n", V2, group("a", high=0)) == Limits(None, 0)


def test_this_machine_can_be_asked():
    found = read_limits()
    assert all(value is None or value >= 0 for value in (found.most, found.high))
