"""Encoding straight into a store's blocks. The reference is `LaneBytes._write` with the codec's own `encode`."""
