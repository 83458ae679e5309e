"""A run's settings in words."""

import shutil

from grpo.run.describe import git_commit


def test_without_git_the_commit_is_null(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert git_commit() is None
