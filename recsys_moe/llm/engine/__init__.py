"""The serving engine: schedule → run → sample → emit (`engine.py`), over paged blocks, a scheduler, sampling and stopping."""
