# fish completion for @program@. @generated@

@tables@

#@guest
# The names of the VMRs in the launch directory, which the option, the environment, the settings' file or nobody names.
# Pure shell: Python takes a second to start in a slow VM.
function _@prefix@_names
    set -l launch (string replace -rf '^--launch-dir=' '' -- $argv '')[-1]
    set -l config (string replace -rf '^--config=' '' -- $argv '')[-1]
    test -n "$launch"; or set launch $VMR_AGENT_LAUNCH_DIR
    if test -z "$launch"
        set launch @launch_dir@
        test -n "$config"; or set config $VMR_AGENT_CONFIG
        test -n "$config"; or set config @config@
        set config (string replace -r '^~/' "$HOME/" -- $config)
        if test -f "$config" -a -r "$config"
            set -l found (string replace -rf '^launch_dir\s*=\s*(.*\S)\s*$' '$1' <$config)
            set -q found[1]; and set launch $found[-1]
        end
    end
    set launch (string replace -r '^~/' "$HOME/" -- $launch | string replace -r '/*$' '')
    for each in $launch/*/*/
        set -l name (string replace -- $launch/ '' $each | string collect)
        string match -rq '^-?[0-9][-+.0-9e]*/[^[:cntrl:]]*$' -- $name
        and string replace -r '/$' '' -- $name
    end
end
#@end
#@host
# The names of the VMs, or, given one, of its VMRs: the command, the options given, the VM.
function _@prefix@_names
    set -l program (string replace -r '^~/' "$HOME/" -- $argv[1])
    set -l flags (string match -r '^--(?:control|log-dir)=.*' -- $argv[2..] '' | string replace -r '=~/' "=$HOME/")
    set -l vm (string replace -rf '^vm=' '' -- $argv[2..] '')
    $program names $flags -- $vm 2>/dev/null </dev/null
end
#@end

function _@prefix@
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
            set need (_@prefix@_values "$verb $word")
        else if test -z "$verb"
            set verb $word
        else
            set -a arguments $word
        end
#@host
        # The rest belongs to the program.
        if test "$verb" = stage; and string match -q -- '--at=*' $given ''; and test (count $arguments) -ge 2
            set plain 1
        end
#@end
    end

    # What may stand where the cursor is.
    set -l kind
    set -l head
    if set -q need[1]
        set kind $need[1]
    else if test -z "$plain"; and string match -q -- '--*=*' $cur
        set head (string replace -r '=.*' '=' -- $cur)
        set cur (string replace -r '^.*?=' '' -- $cur)
        set kind (_@prefix@_values "$verb "(string replace = '' -- $head))[1]
    else if test -z "$verb"
        if string match -q -- '-*' $cur
            printf '%s\t%s\n' --help 'show help and exit' --version 'show the version and exit'
        else
            _@prefix@_verbs
        end
        return
    else
        set -l kinds (_@prefix@_places $verb)
        set kind $kinds[(math (count $arguments) + 1)]
        if test -z "$kind"; and string match -q -- '*\*' "$kinds[-1]"
            set kind $kinds[-1]
        end
        if test -z "$plain"; and begin; string match -q -- '-*' $cur; or test -z "$kind"; end
            for each in (_@prefix@_options $verb)
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
#@guest
        case vmr
            _@prefix@_names $given
#@end
#@host
        case vmr
            _@prefix@_names $words[1] $given vm=$arguments[1]
        case vm
            _@prefix@_names $words[1] $given
#@end
        case signal
            printf "$head%s\n" @signals@
        case '=*'
            for each in (string split , -- (string sub -s 2 -- $kind))
                printf '%s%s\n' $head $each
            end
    end
end

complete -c @program@ -f -k -a '(_@prefix@)'
