"""Kafka behind a narrow contract; one file a client."""
