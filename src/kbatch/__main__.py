from kbatch.cli import main

main()
