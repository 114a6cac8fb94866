"""The command `sidecache doctor`. Imports are inside the functions, so that `--help` does not wait for torch."""

from dataclasses import asdict

from sidecache.job_options import AsJson
from sidecache.messages import print_json


def doctor_command(json: AsJson = False) -> None:
    """Look at what jobs need of this machine: versions, GPU, disk, codecs, hub, memory, limits; with remedies."""
    from extract.checkup import check_machine
    from store.console.terminal import Terminal

    findings = check_machine()
    if json:
        print_json([asdict(finding) for finding in findings])
        return
    terminal, width = Terminal(), max(len(finding.name) for finding in findings)
    for finding in findings:
        terminal.print(
            f"{'ok' if finding.ok else '!':2} {finding.name:{width}}  {finding.found}", highlight=False, soft_wrap=True
        )
        if finding.remedy:
            terminal.print(f"{'':{width + 5}}{finding.remedy}", highlight=False, soft_wrap=True)
