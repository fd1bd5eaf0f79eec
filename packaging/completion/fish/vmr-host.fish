# fish completion for vmr-host. Written by packaging/make_docs.py; change packaging/completion/template.fish instead.

function __vmr_host_verbs
    printf '%s\t%s\n' collect 'Be the collector: take frames from VMs and write their logs.'
    printf '%s\t%s\n' mix 'Show every VM and how its VMRs stand.'
    printf '%s\t%s\n' list 'Show the VMRs of a VM and what became of them.'
    printf '%s\t%s\n' logs 'Print what a VMR printed, byte for byte.'
    printf '%s\t%s\n' rerun 'Run a VMR of a VM again in place, streaming its output.'
    printf '%s\t%s\n' kill 'Signal a VMR\'s whole process tree.'
    printf '%s\t%s\n' pull 'Copy a file or a directory out of a VM.'
    printf '%s\t%s\n' push 'Copy a file or a directory into a VM.'
    printf '%s\t%s\n' stage 'Put VMRs into a VM: a tree as /var/launch has it, or one program.'
    printf '%s\t%s\n' start 'Set time zero, for all VMs or one.'
    printf '%s\t%s\n' hold 'Let nothing new start by schedule, in all VMs or one.'
    printf '%s\t%s\n' resume 'End hold, in all VMs or one.'
end

function __vmr_host_options
    switch $argv[1]
        case collect
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--log-dir' 'where logs and raw output go; default: $VMR_HOST_LOG_DIR'
            printf '%s\t%s\n' '--listen*' 'listen for a VM whose side connects'
            printf '%s\t%s\n' '--expect' 'start the experiment by itself when N VMs are configured'
            printf '%s\t%s\n' '--start-buffer' 'from then to time zero; default: 60'
            printf '%s\t%s\n' '--quota' 'disk that one VM\'s output and logs may take, earlier lives included; a VM over it keeps its output, and sends it when there is room. 0: no bound; default: 64G'
        case mix
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--watch' 'show it again as it changes, until Ctrl-C'
            printf '%s\t%s\n' '--json' 'one array, one object a VM; see below for its keys'
            printf '%s\t%s\n' '--log-dir' 'read only this log directory; ask no collector'
        case list
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--json' 'one array, one object a VMR; see below for its keys'
            printf '%s\t%s\n' '--log-dir' 'read only this log directory; ask no collector'
        case logs
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--attempt' 'default: the latest'
            printf '%s\t%s\n' '--stream' 'default: both, each to its own'
            printf '%s\t%s\n' '--follow' 'go on until the run\'s pipes are closed'
            printf '%s\t%s\n' '--log-dir' 'read only this log directory; ask no collector'
        case rerun
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--detach' 'start it and return once it has begun'
        case kill
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--signal' 'name or number; default: TERM'
        case pull
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
        case push
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
        case stage
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--at' 'start time, to stage a program: as in -4 or 10.5, not 0'
            printf '%s\t%s\n' '--name' 'of the VMR; default: the program\'s'
        case start
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
            printf '%s\t%s\n' '--in' 'from now; default: 0'
        case hold
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
        case resume
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--control' 'the collector\'s socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, for users $XDG_RUNTIME_DIR/vmr-host/control'
    end
end

function __vmr_host_values
    switch $argv[1]
        case 'collect --control'
            echo 'file'
        case 'collect --log-dir'
            echo 'directory'
        case 'collect --listen'
            echo 'source'
        case 'collect --expect'
            echo 'none'
        case 'collect --start-buffer'
            echo 'none'
        case 'collect --quota'
            echo 'none'
        case 'mix --control'
            echo 'file'
        case 'mix --log-dir'
            echo 'directory'
        case 'list --control'
            echo 'file'
        case 'list --log-dir'
            echo 'directory'
        case 'logs --control'
            echo 'file'
        case 'logs --attempt'
            echo 'none'
        case 'logs --stream'
            echo '=stdout,stderr'
        case 'logs --log-dir'
            echo 'directory'
        case 'rerun --control'
            echo 'file'
        case 'kill --control'
            echo 'file'
        case 'kill --signal'
            echo 'signal'
        case 'pull --control'
            echo 'file'
        case 'push --control'
            echo 'file'
        case 'stage --control'
            echo 'file'
        case 'stage --at'
            echo 'none'
        case 'stage --name'
            echo 'none'
        case 'start --control'
            echo 'file'
        case 'start --in'
            echo 'none'
        case 'hold --control'
            echo 'file'
        case 'resume --control'
            echo 'file'
    end
end

function __vmr_host_places
    switch $argv[1]
        case collect
            echo 'source*'
        case list
            echo 'vm'
        case logs
            echo 'vm'
            echo 'vmr'
        case rerun
            echo 'vm'
            echo 'vmr'
        case kill
            echo 'vm'
            echo 'vmr'
        case pull
            echo 'none'
            echo 'vm'
            echo 'file'
        case push
            echo 'file'
            echo 'vm'
            echo 'none'
        case stage
            echo 'vm'
            echo 'file'
            echo 'file*'
        case start
            echo 'vm'
        case hold
            echo 'vm'
        case resume
            echo 'vm'
    end
end

# The names of the VMs, or, given one, of its VMRs: the command, the options given, the VM.
function __vmr_host_names
    set -l program (string replace -r '^~/' "$HOME/" -- $argv[1])
    set -l flags (string match -r '^--(?:control|log-dir)=.*' -- $argv[2..] '' | string replace -r '=~/' "=$HOME/")
    set -l vm (string replace -rf '^vm=' '' -- $argv[2..] '')
    $program names $flags -- $vm 2>/dev/null </dev/null
end

function __vmr_host
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -l verb
    set -l plain
    set -l option
    set -l need
    set -l given
    set -l arguments
    for word in $words[2..]
        if set -q need[1]
            set -e need[1]
            set -a given "$option=$word"
        else if test -z "$plain"; and test "$word" = --
            set plain 1
        else if test -z "$plain"; and string match -q -- '--*=*' $word
            set -a given $word
        else if test -z "$plain"; and string match -q -- '-*' $word; and not string match -rq -- '^-[0-9][^/]*/' $word
            set option $word
            set -a given "$word="
            set need (__vmr_host_values "$verb $word")
        else if test -z "$verb"
            set verb $word
        else
            set -a arguments $word
        end
        # The rest belongs to the program.
        if test "$verb" = stage; and string match -q -- '--at=*' $given ''; and test (count $arguments) -ge 2
            set plain 1
        end
    end

    # What may stand where the cursor is.
    set -l kind
    set -l head
    if set -q need[1]
        set kind $need[1]
    else if test -z "$plain"; and string match -q -- '--*=*' $cur
        set head (string replace -r '=.*' '=' -- $cur)
        set cur (string replace -r '^.*?=' '' -- $cur)
        set kind (__vmr_host_values "$verb "(string replace = '' -- $head))[1]
    else if test -z "$verb"
        if string match -q -- '-*' $cur
            printf '%s\t%s\n' --help 'show help and exit' --version 'show the version and exit'
        else
            __vmr_host_verbs
        end
        return
    else
        set -l kinds (__vmr_host_places $verb)
        set kind $kinds[(math (count $arguments) + 1)]
        if test -z "$kind"; and string match -q -- '*\*' "$kinds[-1]"
            set kind $kinds[-1]
        end
        if test -z "$plain"; and begin; string match -q -- '-*' $cur; or test -z "$kind"; end
            for each in (__vmr_host_options $verb)
                set -l flag (string split \t -- $each)[1]
                if string match -q -- '*\*' $flag; or not string match -q -- "$flag=*" $given ''
                    string replace '*' '' -- $each
                end
            end
        end
    end
    set kind (string replace '*' '' -- "$kind")
    if test "$kind" = source; and string match -q -- '*=*' $cur
        set head "$head"(string replace -r '=.*' '=' -- $cur)
        set cur (string replace -r '^.*?=' '' -- $cur)
        set kind file
    end
    if test "$kind" = vmr; and string match -rq -- '^[./~]' $cur
        set kind directory
    end
    switch "$kind"
        case file
            for each in (__fish_complete_path $cur)
                printf '%s%s\n' $head $each
            end
        case directory
            for each in (__fish_complete_directories $cur)
                printf '%s%s\n' $head $each
            end
        case vmr
            __vmr_host_names $words[1] $given vm=$arguments[1]
        case vm
            __vmr_host_names $words[1] $given
        case signal
            printf "$head%s\n" TERM KILL INT HUP QUIT USR1 USR2 STOP CONT ABRT
        case '=*'
            for each in (string split , -- (string sub -s 2 -- $kind))
                printf '%s%s\n' $head $each
            end
    end
end

complete -c vmr-host -f -k -a '(__vmr_host)'
