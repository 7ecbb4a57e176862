"""Training windows of stories that are read while the run trains (`data.streaming`), in bounded memory."""

from tinystories_slm.data.streaming.dataset import StreamedDataset, StreamError, open_stream

__all__ = ["StreamError", "StreamedDataset", "open_stream"]
