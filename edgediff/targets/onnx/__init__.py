"""ONNX: torch's dynamo exporter, passes over its graphs, int8."""
