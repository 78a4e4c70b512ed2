"""The mathematics: what a stream remembers, what the network sees, what it forecasts. Torch and safetensors only."""
