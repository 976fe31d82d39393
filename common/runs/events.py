"""TensorBoard event files: one file per start of a run, with a complete write per epoch."""

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from common.runs.files import append


class EventFile:
    """A new event file in a folder. It is open only during a write; no thread writes it."""

    def __init__(self, folder: Path, first_step: int):
        """first_step: TensorBoard drops steps of earlier files from this step on. WriteError: as `add`."""
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self.path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        self._write(
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=first_step, session_log=start),
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add scalars by name, all or none. WriteError: the disk is full or the write fails otherwise."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def _write(self, *events: Event) -> None:
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        append(self.path, content.getvalue())
