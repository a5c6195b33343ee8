"""Digests of code: comments, docstrings and layout change nothing; what a script reaches does."""

import pytest

from cohortvi import digest


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "cohortvi"
    (root / "room").mkdir(parents=True)
    (root / "__init__.py").write_text('"""Package."""\n')
    (root / "room/__init__.py").write_text("")
    (root / "room/near.py").write_text("from cohortvi.room import far\n\n\ndef near():\n    return far.far()\n")
    (root / "room/far.py").write_text('"""Far."""\n\n\ndef far():\n    """Say one."""\n    return 1\n')
    (root / "room/other.py").write_text("VALUE = 1\n")
    script = tmp_path / "rule.py"
    script.write_text("from cohortvi.room.near import near\n\nnear()\n")
    monkeypatch.setattr(digest, "PACKAGE", root)

    def code():
        digest.imported.cache_clear()
        digest._tree_digest.cache_clear()
        return digest.code(script)

    return root, script, code


def test_comments_docstrings_and_layout_change_nothing(package):
    root, script, code = package
    before = code()
    (root / "room/far.py").write_text("'''Another.'''\ndef far():\n    '''Say it.'''\n\n    return 1  # one\n")
    script.write_text("# a comment\nfrom cohortvi.room.near import near\n\n\nnear()\n")
    assert code() == before


def test_code_that_is_reached_through_another_module_counts(package):
    root, _, code = package
    before = code()
    (root / "room/far.py").write_text("def far():\n    return 2\n")
    assert code() != before


def test_code_that_is_not_reached_does_not_count(package):
    root, _, code = package
    before = code()
    (root / "room/other.py").write_text("VALUE = 2\n")
    assert code() == before


def test_a_changed_script_counts(package):
    _, script, code = package
    before = code()
    script.write_text("from cohortvi.room.near import near\n\nnear()\nnear()\n")
    assert code() != before
