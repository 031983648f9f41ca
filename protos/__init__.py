"""The typed API as protobuf: the .proto file, and the stubs ``python -m protos.generate`` makes of it."""
