"""Windows of the training stream, prepared ahead of the steps that need them."""

from __future__ import annotations

import queue
import threading

from megatron_sas.data.mlm_dataset import MLMDataset, Window


class PrefetchLoader:
    """Iterate over the windows of steps [start_step, end_step), prepared ahead by a background thread.

    At most `depth` windows wait in the queue. An exception in the thread is raised in the consumer, after the windows
    before it. `close()` (also on leaving a `with` block, and at exhaustion) stops the thread and waits for it.
    """

    def __init__(
        self, dataset: MLMDataset, start_step: int, end_step: int, *, depth: int = 2, pin_memory: bool = False
    ) -> None:
        self._queue: queue.Queue[Window | BaseException | None] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(
            target=self._produce, args=(dataset, start_step, end_step, pin_memory), name="prefetch", daemon=True
        )
        self._thread.start()

    def _produce(self, dataset: MLMDataset, start_step: int, end_step: int, pin_memory: bool) -> None:
        try:
            for step in range(start_step, end_step):
                window = dataset.window(step)
                if not self._put(window.pin_memory() if pin_memory else window):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which would otherwise wait indefinitely
            self._put(error)

    def _put(self, item: Window | BaseException | None) -> bool:
        """Wait for a free place; False when the loader was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> PrefetchLoader:
        return self

    def __next__(self) -> Window:
        if self._done:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Window):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread; safe to call more than once."""
        self._done = True
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
