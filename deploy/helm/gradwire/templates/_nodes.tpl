{{/*
A trainer's other machines: node 0 is the trainer's own pod, nodes 1 and up are pods of an indexed Job of a JobSet. All of it
is empty where nodes.count is 1. Argument: root.
*/}}

{{/* The Secret with the token that nodes show when they join. */}}
{{- define "gradwire.joinTokenSecret" -}}
{{ default (printf "%s-join-token" (include "gradwire.fullname" .)) .Values.trainer.nodes.joinToken.secretName }}
{{- end -}}

{{- define "gradwire.joinTokenVolume" -}}
- name: join-token
  secret:
    secretName: {{ include "gradwire.joinTokenSecret" . }}
    items: [{key: token, path: token}]
    defaultMode: 0440
{{- end -}}

{{/* A JobSet's spec cannot be changed, so its name tells what is in it: helm makes another one and removes the old. With the
names that it gives to pods, it stays within 63 characters. */}}
{{- define "gradwire.nodesName" -}}
{{- $name := include "gradwire.fullname" . -}}
{{- $inside := printf "%s %s %s" $name .Values.trainer.nodes.kind (include "gradwire.nodesSpec" .) -}}
{{- printf "%s-%s" ($name | trunc 36 | trimSuffix "-") ($inside | sha256sum | trunc 8) -}}
{{- end -}}

{{/* The spec of the JobSet. */}}
{{- define "gradwire.nodesSpec" -}}
{{- $root := . -}}
{{- $trainer := .Values.trainer -}}
{{- $name := include "gradwire.fullname" . -}}
{{- $others := sub (int $trainer.nodes.count) 1 -}}
{{- $clientCert := $trainer.nodes.tls.secretName -}}
failurePolicy:
  # A Job whose pods have failed more than backoffLimit times is made anew; the trainer waits meanwhile.
  maxRestarts: {{ int $trainer.nodes.maxRestarts }}
replicatedJobs:
  - name: node
    replicas: 1
    template:
      metadata:
        labels:
          {{- include "gradwire.selector" (list . "node") | nindent 10 }}
          {{- if eq $trainer.nodes.kind "TrainJob" }}
          trainer.kubeflow.org/trainjob-ancestor-step: trainer
          {{- end }}
      spec:
        completionMode: Indexed
        completions: {{ $others }}
        parallelism: {{ $others }}
        backoffLimit: 6
        podFailurePolicy:
          rules:
            # Evicted, preempted, its node gone.
            - action: Ignore
              onPodConditions: [{type: DisruptionTarget, status: "True"}]
            # Told to stop (--stop-exit-code). Kubernetes before 1.28 wants to see both fields.
            - action: Ignore
              onPodConditions: []
              onExitCodes: {containerName: node, operator: In, values: [143]}
        template:
          metadata:
            labels:
              {{- include "gradwire.selector" (list . "node") | nindent 14 }}
              {{- with $trainer.podLabels }}
              {{- toYaml . | nindent 14 }}
              {{- end }}
            {{- with $trainer.podAnnotations }}
            annotations:
              {{- toYaml . | nindent 14 }}
            {{- end }}
          spec:
            restartPolicy: Never
            serviceAccountName: {{ $name }}-trainer
            automountServiceAccountToken: false
            enableServiceLinks: false
            terminationGracePeriodSeconds: 30
            securityContext:
              {{- include "gradwire.podSecurity" . | nindent 14 }}
            {{- with .Values.imagePullSecrets }}
            imagePullSecrets:
              {{- toYaml . | nindent 14 }}
            {{- end }}
            {{- with include "gradwire.placement" $trainer | trim }}{{ . | nindent 12 }}{{ end }}
            containers:
              - name: node
                image: {{ include "gradwire.image" . | quote }}
                imagePullPolicy: {{ .Values.image.pullPolicy }}
                securityContext:
                  {{- include "gradwire.containerSecurity" . | nindent 18 }}
                # Its rank is the Job's completion index and 1, as 0 is the trainer's.
                args:
                  - worker
                  - --join={{ if .Values.tls.secretName }}https://{{ end }}{{ $name }}-0.{{ $name }}-headless.{{ .Release.Namespace }}.svc:29400
                  - --join-token-file=/etc/gradwire/join/token
                  - --health-listen=0.0.0.0:7776
                  - --stop-exit-code=143
                  - --log-json
                  {{- if .Values.tls.secretName }}
                  - --tls-ca-file=/etc/gradwire/tls/ca.crt
                  {{- end }}
                  {{- if $clientCert }}
                  - --tls-cert-file=/etc/gradwire/node-tls/tls.crt
                  - --tls-key-file=/etc/gradwire/node-tls/tls.key
                  {{- end }}
                env:
                  {{- include "gradwire.trainerEnv" $trainer | nindent 18 }}
                {{- with $trainer.envFrom }}
                envFrom:
                  {{- toYaml . | nindent 18 }}
                {{- end }}
                ports:
                  - {name: health, containerPort: 7776}
                # Ready once it has joined.
                {{- include "gradwire.probes" (list $trainer.probes "gradwire.v1.NodeService") | nindent 16 }}
                resources:
                  {{- with include "gradwire.trainerResources" $trainer | trim }}{{ . | nindent 18 }}{{ end }}
                volumeMounts:
                  - {name: data, mountPath: /data}
                  - {name: tmp, mountPath: /tmp}
                  {{- with include "gradwire.sharedMemoryMount" $trainer | trim }}{{ . | nindent 18 }}{{ end }}
                  - {name: join-token, mountPath: /etc/gradwire/join, readOnly: true}
                  {{- if .Values.tls.secretName }}
                  - {name: tls, mountPath: /etc/gradwire/tls, readOnly: true}
                  {{- end }}
                  {{- if $clientCert }}
                  - {name: node-tls, mountPath: /etc/gradwire/node-tls, readOnly: true}
                  {{- end }}
            volumes:
              # The trainer's own volume.
              - name: data
                persistentVolumeClaim:
                  claimName: {{ default (printf "data-%s-0" $name) $trainer.persistence.existingClaim }}
              - {name: tmp, emptyDir: {}}
              {{- with include "gradwire.sharedMemoryVolume" $trainer | trim }}{{ . | nindent 14 }}{{ end }}
              {{- include "gradwire.joinTokenVolume" . | nindent 14 }}
              {{- if .Values.tls.secretName }}
              # The root alone; the trainer's key stays with the trainer.
              - name: tls
                secret:
                  secretName: {{ .Values.tls.secretName }}
                  items: [{key: ca.crt, path: ca.crt}]
                  defaultMode: 0440
              {{- end }}
              {{- with $clientCert }}
              - name: node-tls
                secret:
                  secretName: {{ . }}
                  items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
                  defaultMode: 0440
              {{- end }}
{{- end -}}
