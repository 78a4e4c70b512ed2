"""What runs Carousel: the embedded Kafka, and the files for containers, Prometheus and Grafana."""
