"""How much memory a process may take, on systems that say so in different ways."""

from distillm_cli.cli.host import available_memory

GB = 10**9


def system(root, *, free_kb=None, group="/", **groups):
    """Files as Linux shows them. groups: name of a control group (``top`` or below it) → (limit, used, page cache)."""
    (root / "proc/self").mkdir(parents=True)
    if free_kb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free_kb} kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    for name, (limit, used, cache) in groups.items():
        place = root / "sys/fs/cgroup" / ("" if name == "top" else name)
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return root


def test_the_machine_says_what_is_available(tmp_path):
    assert available_memory(system(tmp_path, free_kb=8_000_000)) == 8_192_000_000


def test_a_container_with_less_counts_and_page_cache_is_free(tmp_path):
    root = system(tmp_path, free_kb=8_000_000, top=(4 * GB, 3 * GB, 2 * GB))
    assert available_memory(root) == 3 * GB


def test_the_tightest_group_above_the_process_counts(tmp_path):
    root = system(tmp_path, free_kb=8_000_000, group="/jobs", top=(2 * GB, GB, 0), jobs=("max", GB, 0))
    assert available_memory(root) == GB


def test_this_machine_has_some():
    assert available_memory() > 0
