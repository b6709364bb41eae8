"""Two processes run the tests, a file at a time: each takes the next one from a queue. They fork once the tests are
collected; the parent tells the child's reports as its own. Not for a few tests, a debugger or --maxfail, nor on a GPU,
which bears no forks."""

import json
import os
import signal
import tempfile
import traceback
from itertools import pairwise

import pytest
import torch

FEW = 300  # tests: fewer are run by one process
LONG = "test_commands", "test_theory", "test_parallel", "test_kernels_cuda", "test_promise"  # files to begin with


class Sender:
    """Writes a child's reports to a file, a line of JSON each."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        """One phase of a test."""
        print(json.dumps(self.config.hook.pytest_report_to_serializable(config=self.config, report=report)),
              file=self.file, flush=True)


def by_file(items):
    """[[the tests of a file]], those that take long first."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    return sorted(files.values(), key=lambda tests: LONG.index(tests[0].path.stem)
                  if tests[0].path.stem in LONG else len(LONG))


def run(files, queue, config):
    """Run the files whose numbers the queue gives until it is empty; how many tests that were."""
    def take():
        return files[number[0]] if (number := os.read(queue, 1)) else []
    done, now = 0, take()
    while now:
        for item, following in pairwise(now):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        later = take()  # so that what both files share is kept
        config.hook.pytest_runtest_protocol(item=now[-1], nextitem=later[0] if later else None)
        done, now = done + len(now), later
    return done


def child(files, queue, config, reports):
    """The other process."""
    config.pluginmanager.unregister(name="terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()  # to files of its own
    config.pluginmanager.register(Sender(config, reports))
    run(files, queue, config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Run what was collected; None leaves it to pytest."""
    config, options = session.config, session.config.option
    if (len(session.items) < FEW or session.testsfailed or options.collectonly or options.usepdb or options.maxfail
            or torch.cuda.is_available() or (os.cpu_count() or 1) < 2 or not hasattr(os, "fork")):
        return None
    files = by_file(session.items)
    config._tmp_path_factory.getbasetemp()  # one folder of both
    queue, end = os.pipe()
    os.write(end, bytes(range(len(files))))
    os.close(end)
    with tempfile.TemporaryFile("w+") as reports:
        if not (process := os.fork()):
            try:
                child(files, queue, config, reports)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        try:
            done = run(files, queue, config)
        except BaseException:
            os.kill(process, signal.SIGTERM)
            raise
        finally:
            os.waitpid(process, 0)
        reports.seek(0)
        theirs = [config.hook.pytest_report_from_serializable(config=config, data=json.loads(line)) for line in reports]
    for report in theirs:
        config.hook.pytest_runtest_logreport(report=report)
    if done + sum(report.when == "teardown" for report in theirs) != len(session.items):
        raise pytest.UsageError("the other half of the tests ended before its time")
    return True
