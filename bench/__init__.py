"""What fastdino is worth on a device: measured, compared and modelled."""
