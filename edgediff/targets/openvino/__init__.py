"""OpenVINO's IR, made from ONNX graphs."""
