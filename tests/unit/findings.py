"""What tests of the doctor say of a finding."""

from graftstack.doctor.finding import Finding


def is_fault(finding: Finding, status: str, *words: str) -> None:
    """The finding has the status, says the words, and offers a fix; each is one line."""
    assert finding.status == status, finding
    for word in words:
        assert word in f"{finding.detail} {finding.fix}", finding
    assert finding.fix
    assert "\n" not in finding.detail + finding.fix


def is_ok(finding: Finding, *words: str) -> None:
    """All is well, and the finding says the words."""
    assert (finding.status, finding.fix) == ("ok", ""), finding
    for word in words:
        assert word in finding.detail, finding
