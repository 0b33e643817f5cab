from ria_vllm.cli import main

main()
