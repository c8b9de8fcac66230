//! What protects the calls of a mount: Kerberos by the option `sec` (RFC 7861), and TLS by `xprtsec` (RFC 9289), both by daemons on
//! the node that the kernel asks (rpc.gssd(8), tlshd(8)).

use rustix::io::Errno;

use super::Export;
use crate::kernel::error::{Error, Subject};

/// What the kernel protects no call with where no option says otherwise, and what protects least.
const PLAIN: [&str; 2] = ["sec=sys", "xprtsec=none"];

/// How the kernel reaches a server, from the least protected: a mount may have more than it asked for.
const TRANSPORTS: [&str; 3] = ["none", "tls", "mtls"];

impl Export {
    fn is_kerberos(&self) -> bool {
        self.option("sec").is_some_and(|sec| sec.starts_with("krb5"))
    }

    pub(super) fn is_tls(&self) -> bool {
        self.option("xprtsec").is_some_and(|transport| transport != "none")
    }

    /// The options by which its calls are protected, such as `sec=krb5p`.
    pub(super) fn protection(&self) -> Vec<String> {
        let shown = ["sec", "xprtsec"].map(|key| Some(format!("{key}={}", self.option(key)?)));
        shown.into_iter().flatten().filter(|option| !PLAIN.contains(&option.as_str())).collect()
    }

    /// Fails where a mount of it, which shows these options (/proc/PID/mountinfo), is protected less than it was asked for, with `ENOTUNIQ`.
    ///
    /// The kernel finds out who an NFS 4 server is, and takes the connection that it has to that server already, whatever that has of TLS
    /// (fs/nfs/nfs4client.c, nfs41_walk_client_list; seen with 6.12).
    pub fn check_protection(&self, shown: &str) -> Result<(), Error> {
        let shown = |key: &str| super::shown(shown, key);
        let rank = |transport: Option<&str>| TRANSPORTS.iter().position(|&known| Some(known) == transport).unwrap_or(0);
        let is_weaker = rank(shown("xprtsec")) < rank(self.option("xprtsec"));
        // AUTH_NULL is shown by the name of its number.
        let flavour = shown("sec").map(|sec| if sec == "null" { "none" } else { sec });
        let is_other = self.option("sec").is_some_and(|sec| flavour != Some(sec));
        if !is_weaker && !is_other {
            return Ok(());
        }
        let has = ["sec", "xprtsec"].map(|key| format!("{key}={}", shown(key).unwrap_or("none"))).join(", ");
        let hint = format!(
            "the kernel would use a connection to this server that the node has already, with {has}: mount the server with the same \
             protection everywhere on this node"
        );
        let action = format!("mount {self} ({})", self.protection().join(", "));
        Err(Error::new(action, Errno::NOTUNIQ).about(Subject::Server).with_hint(hint))
    }

    /// What an errno means that a mount with a protection ends with, as was seen with 6.12.
    pub(super) fn protection_hint(&self, errno: Errno) -> Option<String> {
        let hint = match errno {
            Errno::INVAL if self.is_kerberos() => {
                "is rpc.gssd running on this node, in the driver's network namespace? If it is, see the kernel's words, and nfs(5)"
            }
            Errno::ACCESS if self.is_kerberos() => {
                "nobody vouches for this node: rpc.gssd's log there says why (a key in /etc/krb5.keytab, the KDC, the clock, the server's \
                 name as its principal has it); or the server's own daemon does not run (rpc.svcgssd or gssproxy)"
            }
            Errno::SRCH if self.is_tls() => "is tlshd running on this node, in the driver's network namespace?",
            Errno::ACCESS | Errno::IO | Errno::PIPE | Errno::CONNRESET | Errno::TIMEDOUT if self.is_tls() => {
                "no TLS session was made: tlshd's log on this node says why (a certificate that is not trusted, or for another name); or \
                 tlshd does not run on the server"
            }
            Errno::PERM => {
                let protection = self.protection().join(", ");
                let with = if protection.is_empty() { "sec=sys, without TLS" } else { &protection };
                return Some(format!(
                    "the server refuses this node with {with}: see 'sec' and 'xprtsec' of the export ('exportfs -v' there), and its \
                     client list"
                ));
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests;
    use super::*;

    fn export(options: &[(&str, &str)]) -> Export {
        let options: Vec<_> = options.iter().map(|(key, value)| (*key, Some(*value))).collect();
        tests::export("server", &options)
    }

    #[test]
    fn a_mount_that_is_protected_less_than_asked_for_is_refused() {
        let is_right = |asked: &[_], shown: &str| export(asked).check_protection(shown).is_ok();
        let tls = [("xprtsec", "tls")];
        assert!(is_right(&tls, "ro,sec=sys,xprtsec=tls,addr=10.0.0.1"));
        assert!(is_right(&tls, "ro,xprtsec=mtls"));
        assert!(!is_right(&tls, "ro,sec=sys,addr=10.0.0.1"));
        assert!(!is_right(&[("xprtsec", "mtls")], "ro,xprtsec=tls"));
        assert!(is_right(&[("xprtsec", "none")], "ro") && is_right(&[], "ro,sec=sys,xprtsec=tls"));
        assert!(is_right(&[("sec", "none")], "ro,sec=null") && is_right(&[("sec", "none")], "ro,sec=none"));
        assert!(is_right(&[("sec", "krb5p")], "ro,sec=krb5p") && !is_right(&[("sec", "krb5p")], "ro,sec=sys"));
        let error = export(&[("sec", "sys"), ("xprtsec", "tls")]).check_protection("ro,sec=sys").unwrap_err();
        assert_eq!(
            error.to_string(),
            "mount server:/images (xprtsec=tls): name not unique on network: the kernel would use a connection to this server that the \
             node has already, with sec=sys, xprtsec=none: mount the server with the same protection everywhere on this node"
        );
    }

    #[test]
    fn an_error_names_the_daemon_that_may_be_missing() {
        let hint = |options: &[_], errno| export(options).protection_hint(errno).unwrap_or_default();
        assert!(hint(&[("sec", "krb5")], Errno::INVAL).contains("rpc.gssd"));
        assert!(hint(&[("xprtsec", "tls")], Errno::SRCH).contains("tlshd"));
        assert!(hint(&[("sec", "krb5p"), ("xprtsec", "tls")], Errno::PERM).contains("sec=krb5p, xprtsec=tls"));
        assert!(hint(&[], Errno::PERM).contains("sec=sys, without TLS"));
        assert_eq!(hint(&[("sec", "sys")], Errno::INVAL), "");
        assert_eq!(hint(&[("xprtsec", "none")], Errno::SRCH), "");
    }
}
