"""Compiled programs are kept on disk while a run lasts, and jax's settings are left as they were."""

import contextlib
import os
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from mora_jax.training.run import compilation_cache
from mora_jax.training.run.compilation_cache import persistent_compilation_cache

NAMES = ("jax_compilation_cache_dir", *compilation_cache._SETTINGS)


@pytest.fixture
def events(monkeypatch):
    """What jax says of its cache, without the folder that the tests share."""
    shared, found = jax.config.jax_compilation_cache_dir, Counter()
    compilation_cache._use({"jax_compilation_cache_dir": None})
    monkeypatch.setitem(compilation_cache._SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)

    def listen(event, **_):
        found[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)
    compilation_cache._use({"jax_compilation_cache_dir": shared})


def compiled(number: float) -> None:
    jax.jit(lambda x: jnp.sin(x) * number).lower(1.0).compile()


def programs(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_a_second_start_finds_what_the_first_compiled(events, tmp_path):
    before = [getattr(jax.config, name) for name in NAMES]
    with persistent_compilation_cache(str(tmp_path / "kept")):
        compiled(3.25)
    assert [getattr(jax.config, name) for name in NAMES] == before
    kept = programs(tmp_path / "kept")
    assert kept and not events["cache_hits"]
    compiled(4.25)  # outside
    assert programs(tmp_path / "kept") == kept
    jax.clear_caches()
    with persistent_compilation_cache(str(tmp_path / "kept")):
        compiled(3.25)
    assert events["cache_hits"] == 1 and programs(tmp_path / "kept") == kept


def test_settings_come_back_after_an_error_too(events, tmp_path):
    with contextlib.suppress(KeyError), persistent_compilation_cache(str(tmp_path)):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        raise KeyError
    assert jax.config.jax_compilation_cache_dir is None


def test_the_default_folder_is_the_users_and_off_is_nowhere(events, tmp_path, monkeypatch):
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path))
    with persistent_compilation_cache("off"):
        compiled(5.25)
    assert not os.listdir(tmp_path)
    with persistent_compilation_cache(None):
        assert jax.config.jax_compilation_cache_dir.startswith(f"{tmp_path}/programs/")
    (tmp_path / "file").write_text("")
    with persistent_compilation_cache(str(tmp_path / "file" / "inside")):
        assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_jax_has_already_stays(tmp_path):
    given = jax.config.jax_compilation_cache_dir  # of the environment, as tests have it
    assert given == os.environ["JAX_COMPILATION_CACHE_DIR"]
    with persistent_compilation_cache(str(tmp_path)):
        assert jax.config.jax_compilation_cache_dir == given


def test_a_program_that_was_half_written_goes_and_is_kept_again(events, tmp_path):
    with persistent_compilation_cache(str(tmp_path)):
        compiled(6.25)
    (name,) = programs(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:100])
    path.with_name(name.removesuffix("-cache") + "-atime").unlink()  # jax writes it after the program
    jax.clear_caches()
    with persistent_compilation_cache(str(tmp_path)):
        assert not programs(tmp_path)
        compiled(6.25)
    assert programs(tmp_path) == [name] and path.stat().st_size > 100
