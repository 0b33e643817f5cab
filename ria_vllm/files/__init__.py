"""Files of JSON, text and safetensors that may be damaged, or made to do harm."""
